#!/usr/bin/env bash
# PEFT 0.21.2, transformers 5.23.0, torch 2.13.0 (CPU).
#
# A batch with one adapter per sequence (`adapter_names`) gives the wrong rows, and no error, where a layer's input has
# time before batch and there happen to be as many tokens as sequences. Each LoRA layer picks rows of its input's first
# dimension by the position of a name in the list (peft/tuners/lora/layer.py, _mixed_batch_forward). XLNet's feed-forward
# layers get (tokens, sequences, hidden). With 4 sequences of 5 tokens the layer raises a ValueError; with 4 of 4 it
# runs, and token t of every sequence gets the adapter of sequence t.
#
# Expected: each sequence equals the same sequence alone with its adapter, or an error.
# Seen:     an error for 4 x 5; for 4 x 4 no error, and hidden states off by more than 1e-2 where 1e-5 is right.
# Exits non-zero if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip="$folder/venv/bin/pip --disable-pip-version-check -q"
$pip install torch==2.13.0
$pip install peft==0.21.2 transformers==5.23.0 accelerate==1.15.0
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'EOF'
import warnings

import peft
import torch
import transformers

warnings.filterwarnings("ignore")
torch.manual_seed(0)
config = transformers.XLNetConfig(vocab_size=50, d_model=16, n_layer=1, n_head=2, d_inner=24)
base = transformers.XLNetModel(config)
model = None
for name in ("red", "blue"):
    lora = peft.LoraConfig(r=4, target_modules=["layer_1", "layer_2"], init_lora_weights=False)
    if model is None:
        model = peft.get_peft_model(base, lora, adapter_name=name)
    else:
        model.add_adapter(name, lora)
model.eval()
names = ["red", "blue", "blue", "red"]


@torch.no_grad()
def error(tokens):
    ids = torch.randint(0, 50, (4, tokens))
    together = model(ids, adapter_names=names).last_hidden_state
    worst = 0.0
    for row, name in enumerate(names):
        model.set_adapter(name)
        alone = model(ids[row : row + 1]).last_hidden_state[0]
        worst = max(worst, (together[row] - alone).abs().max().item())
    return worst


print("peft", peft.__version__, "transformers", transformers.__version__, "torch", torch.__version__)
worst = error(4)
print(f"4 sequences of 4 tokens: no error, off by {worst:.3g}")
if worst < 1e-2:
    raise SystemExit("changed: every sequence gets its own adapter now")
try:
    print("4 sequences of 5 tokens: no error, off by", error(5))
    raise SystemExit("changed: other lengths are taken now")
except ValueError as problem:
    print("4 sequences of 5 tokens: ValueError:", problem)
EOF
