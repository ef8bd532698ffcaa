#!/usr/bin/env bash
# PEFT 0.21.2, transformers 5.23.0, torch 2.13.0 (CPU).
#
# After a forward with `adapter_names` has raised, the names of that batch stay in force: every later call of the model,
# without `adapter_names` and whatever set_adapter() chose, gets them again. PEFT hands the names to its layers by forward
# pre-hooks and removes these behind the forward, but not when it raises (peft/tuners/lora/model.py,
# _enable_peft_forward_hooks: no try/finally around the yield).
#
# Expected: a call that failed leaves nothing behind; the next one gives what a fresh model gives.
# Seen:     the next one, a plain batch of two with adapter "red" active, gives the failed batch's adapters row by row,
#           and a batch of three raises about adapter_names that nobody passed.
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
base = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 8))
model = None
for name in ("red", "blue"):
    lora = peft.LoraConfig(r=4, target_modules=["0", "2"], init_lora_weights=False)
    if model is None:
        model = peft.get_peft_model(base, lora, adapter_name=name)
    else:
        model.add_adapter(name, lora)
model.eval()
x = torch.randn(2, 8)


@torch.no_grad()
def plain(name):
    model.set_adapter(name)
    return model(x)


print("peft", peft.__version__, "transformers", transformers.__version__, "torch", torch.__version__)
red, blue = plain("red"), plain("blue")
try:
    model(torch.randn(2, 7), adapter_names=["blue", "red"])  # a width that the layer does not have
except RuntimeError as problem:
    print("the batch with names:", problem)
after = plain("red")
print("row 0 afterwards, 'red' active: off red by", (after[0] - red[0]).abs().max().item())
print("row 0 afterwards, 'red' active: off blue by", (after[0] - blue[0]).abs().max().item())
if torch.allclose(after, red, atol=1e-5):
    raise SystemExit("changed: the names of a batch that failed are forgotten")
assert torch.allclose(after[0], blue[0], atol=1e-5)
try:
    model(torch.randn(3, 8))
    raise SystemExit("changed: a later batch of another size runs")
except ValueError as problem:
    print("a later batch of three:", problem)
EOF
