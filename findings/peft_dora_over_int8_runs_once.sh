#!/usr/bin/env bash
# peft 0.21.2, bitsandbytes 0.50.2, torch 2.13.0 (CPU).
#
# DoRA over bitsandbytes' Linear8bitLt: PEFT computes the norm of the weight from the base layer's weight.SCB at every forward, and
# the layer's own first forward on a CPU hands SCB over to its state and leaves None on the weight.
#
# Expected: a model that ran once runs again.
# Seen:     the first forward works, the second raises AttributeError: 'NoneType' object has no attribute 'unsqueeze'.
# Exits non-zero if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" --disable-pip-version-check -q install torch==2.13.0 numpy bitsandbytes==0.50.2 peft==0.21.2 transformers==5.23.0
cd "$folder"
"$folder/venv/bin/python" - <<'CODE'
import bitsandbytes as bnb
import peft
import torch
from torch import nn

torch.manual_seed(0)
layer = bnb.nn.Linear8bitLt(64, 96, bias=False, has_fp16_weights=False).to("cpu")
base = nn.Sequential(layer)
base.is_loaded_in_8bit = True
model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["0"], r=4, use_dora=True))
x = torch.randn(3, 64)
print("first forward:", tuple(model(x).shape))
try:
    model(x)
except AttributeError as error:
    print("second forward:", error)
    assert "unsqueeze" in str(error)
else:
    raise SystemExit("the second forward works")
print("peft", peft.__version__, "bitsandbytes", bnb.__version__, "torch", torch.__version__)
CODE
echo "as described"
