#!/usr/bin/env bash
# PEFT 0.21.2, torch 2.13.0 (CPU).
#
# OFT's option use_cayley_neumann (on by default) is described as a faster approximation of the Cayley transform. For the same
# parameters the two rotate in opposite directions: the exact branch computes (I - Q)(I + Q)^-1, the series is the one of
# (I + Q)(I - Q)^-1 (peft/tuners/oft/layer.py, _cayley_batch). A checkpoint loaded with the option turned off, for an exactly
# orthogonal rotation say, loads without a word and undoes the rotation instead of applying it.
#
# Expected: the exact rotation within the error of the series, which more terms make small.
# Seen:     with 20 terms the series differs from the exact rotation by more than 0.1, and from its inverse by less than 1e-6.
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
SIZE = 16


def rotation(state=None, **options):
    """The matrix R of y = x R, from a base layer that is the identity; and the adapter's state."""
    base = torch.nn.Linear(SIZE, SIZE, bias=False)
    torch.nn.init.eye_(base.weight)
    config = peft.OFTConfig(oft_block_size=8, target_modules=["0"], **options)
    model = peft.get_peft_model(torch.nn.Sequential(base), config).eval()
    if state is None:
        generator = torch.Generator().manual_seed(0)
        state = peft.get_peft_model_state_dict(model)
        state = {key: 0.05 * torch.randn(value.shape, generator=generator) for key, value in state.items()}
    peft.set_peft_model_state_dict(model, state)
    with torch.no_grad():
        return model(torch.eye(SIZE)), state


def distance(a, b):
    return (a - b).abs().max().item()


series, state = rotation(num_cayley_neumann_terms=20)
default, _ = rotation(state)
exact, _ = rotation(state, use_cayley_neumann=False)
print("peft", peft.__version__, "torch", torch.__version__)
print(f"exact rotation, orthogonal to {distance(exact @ exact.T, torch.eye(SIZE)):.1e}")
for name, r in (("series of 5 terms, the default", default), ("series of 20 terms", series)):
    print(f"{name}: differs from exact by {distance(r, exact):.1e}, from its inverse by {distance(r, exact.T):.1e}")
if not (distance(series, exact) > 0.1 and distance(series, exact.T) < 1e-6):
    raise SystemExit("changed")
CODE
