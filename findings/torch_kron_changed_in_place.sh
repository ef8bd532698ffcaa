#!/usr/bin/env bash
# torch 2.13.0 (CPU).
#
# A tensor that backward needs and that was changed in place since the forward pass makes torch raise ("modified by an inplace
# operation"). torch.kron takes no part in that: its backward uses the values that its arguments have then, and returns the
# gradient of a product that was never computed, without an error.
#
# Expected: RuntimeError, as for the same product written with outer products.
# Seen:     after b.mul_(0.5) the gradient of sum(kron(a, b)) for a is half of what it was.
# Exits non-zero if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" --disable-pip-version-check -q install torch==2.13.0 numpy
"$folder/venv/bin/python" - <<'CODE'
import torch


def by_hand(a, b):
    return (a[:, None, :, None] * b[None, :, None, :]).reshape(a.shape[0] * b.shape[0], -1)


def gradient(product, change):
    torch.manual_seed(0)
    a, b = torch.randn(2, 2, requires_grad=True), torch.rand(3, 3)
    y = product(a, b).sum()
    if change:
        b.mul_(0.5)
    y.backward()
    return a.grad


right, seen = gradient(torch.kron, False), gradient(torch.kron, True)
try:
    said = f"no error, {gradient(by_hand, True)}"
except RuntimeError as error:
    said = str(error)
print("torch", torch.__version__)
print("kron, nothing changed:", right.flatten().tolist())
print("kron, an argument changed before backward:", seen.flatten().tolist())
print("the same product by hand:", said.splitlines()[0])
assert torch.allclose(seen, right / 2) and "modified by an inplace operation" in said
CODE
echo "as described"
