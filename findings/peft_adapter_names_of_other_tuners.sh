#!/usr/bin/env bash
# PEFT 0.21.2, transformers 5.23.0, torch 2.13.0 (CPU).
#
# `model(x, adapter_names=[...])` is there for LoRA. On a model of most other tuners it raises nothing: the names are taken
# off the call (peft/peft_model.py, special_peft_forward_args) and nobody reads them, so every row gets the active adapter,
# also with names that no adapter has. A PeftMixedModel hands them to the model inside, and a transformers model swallows
# them.
#
# Expected: an error, as there is one for a LoRA model in training, or for a name that does not exist.
# Seen:     VeRA, (IA)^3 and a PeftMixedModel of LoRA and AdaLoRA give the active adapter's result for every row.
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
TARGETS = ["q_proj", "v_proj"]
LORA = peft.LoraConfig(target_modules=TARGETS, r=4)
KINDS = {
    "VeRA": (peft.VeraConfig(target_modules=TARGETS, r=8),) * 2,
    "(IA)^3": (peft.IA3Config(target_modules=TARGETS, feedforward_modules=[]),) * 2,
    "PeftMixedModel": (LORA, peft.AdaLoraConfig(target_modules=TARGETS, init_r=4, target_r=2, total_step=10)),
}
print("peft", peft.__version__, "transformers", transformers.__version__, "torch", torch.__version__)
ids = torch.randint(0, 64, (3, 5))
for kind, (first, second) in KINDS.items():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
    )
    base = transformers.LlamaForCausalLM(config)
    model = peft.get_peft_model(base, first, "red", mixed=kind == "PeftMixedModel")
    model.add_adapter("blue", second)
    for name, p in model.named_parameters():
        if any(part in name for part in ("lora_", "lambda", "ia3_l")):
            p.data += 0.3 * torch.randn(p.shape)
    model.eval()
    with torch.no_grad():
        model.set_adapter("blue")
        blue = model(ids).logits
        model.set_adapter("red")
        red = model(ids).logits
        named = model(ids, adapter_names=["blue", "red", "__base__"]).logits
        unknown = model(ids, adapter_names=["no", "such", "adapter"]).logits
    assert not torch.allclose(red, blue)
    print(f"{kind}: every row is that of 'red':", torch.equal(named, red), "; with unknown names:", torch.equal(unknown, red))
    if not (torch.equal(named, red) and torch.equal(unknown, red)):
        raise SystemExit("changed: the names are read, or refused")
EOF
