#!/usr/bin/env bash
# PEFT 0.21.2, torch 2.13.0 (CPU).
#
# LoRA on linear1 and linear2 of torch.nn.TransformerEncoderLayer trains, and is ignored in evaluation, without a word. In
# evaluation without gradients the layer takes its fast path (torch/nn/modules/transformer.py), one fused operation that is
# handed self.linear1.weight. That is what PEFT's layer shows of the base, so the adapter is not in it.
#
# Expected: the same function in training (dropout 0) and evaluation.
# Seen:     the adapter changes outputs by about 1 in training mode, in evaluation by exactly 0.
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


class Encoder(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)

    def forward(self, x):
        return self.layer(x)


lora = peft.LoraConfig(r=4, target_modules=["linear1", "linear2"], init_lora_weights=False)
model = peft.get_peft_model(Encoder(), lora)
x = torch.randn(2, 5, 16)


@torch.no_grad()
def effect():
    with model.disable_adapter():
        base = model(x)
    return (model(x) - base).abs().max().item()


print("peft", peft.__version__, "torch", torch.__version__)
in_training = effect()
model.eval()
in_evaluation = effect()
print(f"the adapter changes outputs by {in_training:.3g} in training mode, by {in_evaluation:.3g} in evaluation")
if in_training < 1e-2 or in_evaluation != 0.0:
    raise SystemExit("changed: the adapter acts in evaluation as in training")
CODE
