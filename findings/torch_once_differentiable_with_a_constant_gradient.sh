#!/usr/bin/env bash
# torch 2.13.0 (CPU).
#
# torch.autograd.function.once_differentiable marks a backward that must not be differentiated again. What it looks at is
# whether an argument of backward requires a gradient: with grad_outputs that are constants, the usual case, none does, and the
# gradients come back as constants, create_graph=True or not. If the rest of the loss does depend on the inputs, a second
# derivative through it is then a wrong number and no error.
#
# Expected: RuntimeError, as where the gradient of the output requires one.
# Seen:     y = x^3 by such a function, loss = (dy/dx)^2 + x^2: the gradient of the loss is 2 x, where it is 36 x^3 + 2 x.
#           Without the decorator torch's own answer is right; with grad_outputs that require grad the decorator raises.
# Exits non-zero if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" --disable-pip-version-check -q install torch==2.13.0
"$folder/venv/bin/python" - <<'CODE'
import warnings

warnings.filterwarnings("ignore")
import torch
from torch.autograd.function import once_differentiable


def cube(decorator):
    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        @decorator
        def backward(ctx, dy):
            (x,) = ctx.saved_tensors
            return 3 * dy * x**2

    return Cube.apply


def gradient_of_loss(f, dy):
    x = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(f(x), x, dy, create_graph=True)
    (slope**2 + x**2).backward()
    return x.grad.item()


plain, marked = cube(lambda backward: backward), cube(once_differentiable)
one = torch.ones((), dtype=torch.float64)
right, seen = gradient_of_loss(plain, one), gradient_of_loss(marked, one)
try:
    said = f"no error, {gradient_of_loss(marked, one.clone().requires_grad_())}"
except RuntimeError as error:
    said = str(error)
print("torch", torch.__version__)
print("without the decorator:", right)
print("with it, grad_outputs constant:", seen)
print("with it, grad_outputs that require grad:", said)
assert right == 36 * 2.0**3 + 2 * 2.0 and seen == 2 * 2.0
assert "once_differentiable" in said
CODE
echo "as described"
