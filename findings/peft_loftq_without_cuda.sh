#!/usr/bin/env bash
# peft 0.21.2, bitsandbytes 0.50.2, torch 2.13.0 (CPU).
#
# bitsandbytes quantises, multiplies and dequantises 4-bit weights on CPUs, and PEFT trains LoRA over them there. Both ways to a
# LoftQ start, init_lora_weights="loftq" and replace_lora_weights_loftq, name "cuda" as the device of their SVD whatever device
# the weight is on (peft/utils/loftq_utils.py, compute_device).
#
# Expected: a model on the CPU gets its LoftQ start there.
# Seen:     the same model trains with a random start, and both ways to LoftQ raise that torch has no CUDA.
# Exits non-zero if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" --disable-pip-version-check -q install torch==2.13.0 numpy scipy safetensors bitsandbytes==0.50.2 peft==0.21.2 transformers==5.23.0
cd "$folder"
"$folder/venv/bin/python" - <<'CODE'
import bitsandbytes as bnb
import peft
import torch
from safetensors.torch import save_file
from torch import nn

torch.manual_seed(0)
weight = torch.randn(96, 64)
save_file({"0.weight": weight}, "model.safetensors")


def dense():
    return nn.Sequential(nn.Linear(64, 96, bias=False))


def quantised():
    layer = bnb.nn.Linear4bit(64, 96, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    layer.weight = bnb.nn.Params4bit(weight.clone(), requires_grad=False, quant_type="nf4")
    base = nn.Sequential(layer.to("cpu"))
    base.is_loaded_in_4bit = True
    return base


model = peft.get_peft_model(quantised(), peft.LoraConfig(target_modules=["0"], r=4))
model(torch.randn(3, 64)).sum().backward()
print("random start: trains on", next(model.parameters()).device)

loftq = peft.LoraConfig(target_modules=["0"], r=4, init_lora_weights="loftq", loftq_config=peft.LoftQConfig(loftq_bits=4))
for name, start in (
    ("init_lora_weights", lambda: peft.get_peft_model(dense(), loftq)),
    ("replace_lora_weights_loftq", lambda: peft.replace_lora_weights_loftq(model, "model.safetensors")),
):
    try:
        start()
    except (AssertionError, RuntimeError) as error:
        print(f"{name}: {type(error).__name__}:", str(error).splitlines()[0])
        assert "CUDA" in str(error) or "NVIDIA" in str(error), error
    else:
        raise SystemExit(f"{name} works on the CPU")
print("peft", peft.__version__, "bitsandbytes", bnb.__version__, "torch", torch.__version__)
CODE
echo "as described"
