#!/usr/bin/env bash
# torch 2.13.0 (CPU).
#
# torch.nn.utils.parametrizations.orthogonal keeps, beside the trained parameter, the weight that it started from, and the
# diagonal of the parameter holds signs. The parametrisation reads those signs by rounding the diagonal to integers, towards zero.
# So an optimiser that shrinks the parameter, as any weight decay does, turns a diagonal of ones into zeros: after the first step the
# "orthogonal" weight is the zero matrix. Nothing is raised, and the gradient through it is zero from then on.
#
# Expected: the weight stays orthogonal whatever the parameter's values are.
# Seen:     a 4 x 64 weight has norm 2 before one AdamW step with weight_decay=0.01, and 0 after it; with weight_decay=0 it has 2.
# Exits non-zero if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" --disable-pip-version-check -q install torch==2.13.0 numpy
"$folder/venv/bin/python" - <<'CODE'
import torch
from torch import nn


def norms(decay):
    torch.manual_seed(0)
    layer = nn.utils.parametrizations.orthogonal(nn.Linear(64, 4, bias=False))
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-3, weight_decay=decay)
    before = layer.weight.norm().item()
    layer(torch.randn(3, 64)).sum().backward()
    optimizer.step()
    return before, layer.weight.norm().item()


kept, lost = norms(0.0), norms(0.01)
print("torch", torch.__version__)
print("norm before and after a step, without weight decay:", kept)
print("norm before and after a step, with weight decay:", lost)
assert abs(kept[0] - 2) < 1e-4 and abs(kept[1] - 2) < 1e-4
assert abs(lost[0] - 2) < 1e-4 and lost[1] == 0
CODE
echo "as described"
