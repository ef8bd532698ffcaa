#!/usr/bin/env bash
# PEFT 0.21.2, torch 2.13.0 (CPU).
#
# DoRA on a bfloat16 model: with lora_dropout > 0 a convolution raises in training. There DoRA runs the base convolution a second
# time, on the input after dropout, which is float32 by then as the adapter is (autocast_adapter_dtype, on by default), but
# the base's weight is still bfloat16 (peft/tuners/lora/dora.py). A Linear's weight is cast at that place. Without
# dropout, or in evaluation, the base's first result serves and nothing fails: a check of the model in eval mode passes.
#
# Expected: what a Linear does: a bfloat16 result.
# Seen:     RuntimeError about Float and BFloat16 in training with lora_dropout=0.1 for Conv1d and Conv2d.
# Exits non-zero if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip="$folder/venv/bin/pip --disable-pip-version-check -q"
$pip install torch==2.13.0
$pip install peft==0.21.2 transformers==5.23.0 accelerate==1.15.0
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'CODE'
import warnings

import peft
import torch

warnings.filterwarnings("ignore")
torch.manual_seed(0)
LAYERS = {
    "Linear": (lambda: torch.nn.Linear(4, 4), (2, 4)),
    "Conv1d": (lambda: torch.nn.Conv1d(4, 4, 3), (2, 4, 8)),
    "Conv2d": (lambda: torch.nn.Conv2d(4, 4, 3), (2, 4, 8, 8)),
}


def forward(layer, dropout, training):
    make, shape = LAYERS[layer]
    config = peft.LoraConfig(r=2, use_dora=True, lora_dropout=dropout, target_modules=["0"])
    model = peft.get_peft_model(torch.nn.Sequential(make().bfloat16()), config).train(training)
    try:
        return str(model(torch.randn(shape, dtype=torch.bfloat16)).dtype)
    except RuntimeError as error:
        return f"RuntimeError: {error}"


print("peft", peft.__version__, "torch", torch.__version__)
changed = False
for layer in LAYERS:
    for dropout, training in ((0.0, True), (0.1, False), (0.1, True)):
        seen = forward(layer, dropout, training)
        print(f"{layer}, dropout {dropout}, {'training' if training else 'evaluation'}: {seen}")
        fails = seen.startswith("RuntimeError") and "Float" in seen and "BFloat16" in seen
        expected = layer != "Linear" and dropout > 0 and training
        changed |= not (fails if expected else seen == "torch.bfloat16")
if changed:
    raise SystemExit("changed")
CODE
