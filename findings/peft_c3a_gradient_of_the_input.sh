#!/usr/bin/env bash
# PEFT 0.21.2, torch 2.13.0 (CPU).
#
# C3A's layer has a backward of its own (peft/tuners/c3a/utils.py, BlockCircularConvolution). Its gradient of the kernel is
# right. Its gradient of the input is not: each block of dy is taken in the order 0, b - 1, ..., 1, as one of the
# Fourier transforms runs in the wrong direction. A test of one layer's parameters passes; in a model all that lies below a C3A
# layer, the adapters of earlier layers among it, trains on a wrong gradient.
#
# Expected: both gradients are those of the forward, which is linear in x and in the kernel, to rounding.
# Seen:     the kernel's is right to 1e-6, the input's is off by more than half its norm, and is the one of dy with reversed
#           blocks.
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
ROWS, IN, OUT, BLOCK = 5, 8, 12, 4
base = torch.nn.Linear(IN, OUT, bias=False)
torch.nn.init.zeros_(base.weight)
config = peft.C3AConfig(block_size=BLOCK, target_modules=["0"], init_weights="gaussian")
model = peft.get_peft_model(torch.nn.Sequential(base), config)
(kernel,) = (p for p in model.parameters() if p.requires_grad)

x = torch.randn(ROWS, IN, requires_grad=True)
dy = torch.randn(ROWS, OUT)
model(x).backward(dy)

with torch.no_grad():
    jacobian = model(torch.eye(IN)).T  # (OUT, IN): the layer is linear
    dk = torch.zeros_like(kernel)
    values = kernel.clone()
    for i in range(kernel.numel()):  # and linear in its kernel
        kernel.zero_().view(-1)[i] = 1
        dk.view(-1)[i] = (model(x) * dy).sum()
    kernel.copy_(values)

order = -torch.arange(BLOCK) % BLOCK
reversed_dy = dy.view(ROWS, -1, BLOCK)[..., order].reshape(ROWS, OUT)


def error(seen, right):
    return ((seen - right).norm() / right.norm()).item()


kernel_error, input_error = error(kernel.grad, dk), error(x.grad, dy @ jacobian)
reversed_error = error(x.grad, reversed_dy @ jacobian)
print("peft", peft.__version__, "torch", torch.__version__)
print(f"relative error: kernel {kernel_error:.1e}, input {input_error:.1e}, for reversed blocks {reversed_error:.1e}")
if not (kernel_error < 1e-5 and input_error > 0.5 and reversed_error < 1e-5):
    raise SystemExit("changed")
CODE
