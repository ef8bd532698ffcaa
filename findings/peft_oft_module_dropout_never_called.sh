#!/usr/bin/env bash
# PEFT 0.21.2, torch 2.13.0 (CPU).
#
# OFT takes module_dropout, makes a dropout layer of it, and nothing calls that layer (peft/tuners/oft/layer.py: oft_dropout
# is filled and otherwise left alone). There is no such regularisation, whatever the number says. lora_dropout, and
# boft_dropout of the sibling, are real.
#
# Expected: with 0.9, 7 of 8 blocks are the identity in each training step, so that training takes another course.
# Seen:     20 training steps with 0.9 end in the parameters of 20 steps with 0.0, bit by bit; with lora_dropout they do not.
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
CALLS = []


def train(config):
    """The adapter's parameters after 20 steps; all that is random has the same seed."""
    torch.manual_seed(0)
    model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(64, 16)), config).train()
    for name, module in model.named_modules():
        if name.endswith("oft_dropout.default"):
            module.register_forward_hook(lambda *_: CALLS.append(1))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    x, y = torch.randn(32, 64), torch.randn(32, 16)
    for _ in range(20):
        torch.nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    return torch.cat([p.detach().flatten() for p in parameters])


def oft(p):
    return train(peft.OFTConfig(oft_block_size=8, module_dropout=p, target_modules=["0"]))


def lora(p):
    return train(peft.LoraConfig(r=4, lora_dropout=p, target_modules=["0"]))


print("peft", peft.__version__, "torch", torch.__version__)
without, dropped = oft(0.0), oft(0.9)
assert without.abs().max() > 1e-3
same, same_lora = torch.equal(without, dropped), torch.equal(lora(0.0), lora(0.9))
print(f"0.9 trains as 0.0: OFT {same}, LoRA {same_lora}; calls of OFT's dropout: {len(CALLS)}")
if not (same and not CALLS and not same_lora):
    raise SystemExit("changed")
CODE
