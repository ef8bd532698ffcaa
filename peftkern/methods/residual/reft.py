"""Representation fine-tuning (Wu et al. 2024): listed rows of h are edited in a subspace.

y = h + R^T (f(W h + b) - R h)        with or without the source f(W h + b), the projection R h, and R's orthonormal rows
"""

from __future__ import annotations

from ...autograd.residual.reft import reft
from .stream import StreamMethod, register

PYREFT = {"pyreft": ((0, 1), (0, 1))}
BOTH = {"adapters": ((1, 3), (1, 3)), **PYREFT}
# Whether AdapterHub's ``adapters`` has it too.
_VARIANTS = {
    "LoReFT": BOTH, "NoReFT": BOTH, "DiReFT": BOTH, "NodiReFT": BOTH, "ConsReFT": PYREFT, "LobiReFT": PYREFT,
}  # fmt: skip

REFT = [
    register(
        StreamMethod(
            name=name, taxonomy="additive", family="R", op="reft", function=reft, tested=tested,
            saves="(B P, R) of the listed rows, and these rows if R or W trains", merges="not at all: it acts on some tokens",
        )
    )
    for name, tested in _VARIANTS.items()
]  # fmt: skip
