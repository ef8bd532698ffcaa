"""The named random problems of ``peftkern verify``, op by op: a name says all that is needed to make a problem again.

    DTYPE:SEED[:large]           lora_linear; ``large``: M K N above 2^31
    multi:DTYPE:SEED[:KIND]      multi_lora_linear, or sgmv (a quarter of them), on a list or a bank (three in ten)
    norm:DTYPE:SEED[:cancel]     lora_row_norm; ``cancel``: of what the branch leaves of its own negative, rounded
    rotate:DTYPE:SEED[:tall]     block_rotate; ``tall``: 20,000 rows
    bottleneck:DTYPE:SEED[:tall] bottleneck_adapter; ``tall``: 20,000 rows

The first three may end in ``:codes``, too: of a weight in codes, its kind by the seed.
KIND: ``segment`` (10,000 rows, all with one adapter), ``rows`` (65,600 rows), ``base`` (no row has an adapter), ``wide``
(a rank of 512 beside a rank of 1).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from peftkern.problem import DTYPES

# Every SPECIAL_EVERY-th problem of a dtype is of one of the kinds, in turn; half way between them one is of a weight in codes.
SPECIAL_EVERY = 12


@dataclass(frozen=True)
class ProblemSet:
    """Problems of one op. ``kinds``: the special ones; ``heavy``: those beyond an interpreted back end, whose
    ``limits`` (arguments of the random problem) hold for all others; ``special``: what the kinds are, in words.
    ``codes``: whether its weight may be in codes."""

    op: str
    prefix: str
    kinds: tuple[str, ...]
    heavy: frozenset[str]
    limits: dict[str, int]
    special: str
    codes: bool = False

    @property
    def ends(self) -> tuple[str, ...]:
        """How a name may end."""
        return (*self.kinds, *["codes"] * self.codes)

    @property
    def form(self) -> str:
        """How names are written."""
        return " or ".join(f"{self.prefix}DTYPE:SEED{end}" for end in ("", *(f":{kind}" for kind in self.ends)))

    def names(self, count: int, dtypes: Sequence[str], seed: int, *, special: bool) -> list[str]:
        """Names of ``count`` problems, dtypes in turn, with or without those of the kinds."""
        found = []
        for i in range(count):
            turn, last = divmod(i // len(dtypes), SPECIAL_EVERY)
            kind = f":{self.kinds[turn % len(self.kinds)]}" if special and last == SPECIAL_EVERY - 1 else ""
            if special and self.codes and last == SPECIAL_EVERY // 2 - 1:
                kind = ":codes"
            found.append(f"{self.prefix}{dtypes[i % len(dtypes)]}:{seed + i}{kind}")
        return found

    def parse(self, name: str) -> tuple[torch.dtype, int, str]:
        """(dtype, seed, kind or empty) of a name; ValueError if it is none."""
        parts = name.removeprefix(self.prefix).split(":") if name.startswith(self.prefix) else []
        good = len(parts) in (2, 3) and parts[0] in DTYPES and parts[1].isascii() and parts[1].isdigit()
        if not good or parts[2:] not in ([], *([kind] for kind in self.ends)):
            raise ValueError(f"{name!r} is not {self.form}")
        return DTYPES[parts[0]], int(parts[1]), parts[2] if parts[2:] else ""

    def fits_interpreter(self, name: str) -> bool:
        """Whether Triton's interpreter, which gets bf16 wrong by itself, is given this problem."""
        dtype, _, kind = self.parse(name)
        return dtype != torch.bfloat16 and kind not in self.heavy

    def make(self, name: str, **limits):
        """The problem of that name."""
        dtype, seed, kind = self.parse(name)
        if kind in self.heavy and limits:
            raise ValueError(f"{name!r}: no {kind} problem is within the limits of an interpreted back end")
        problem = _MAKE[self.op](dtype, seed, kind, limits)
        return _in_codes(problem, seed) if kind == "codes" else problem


def _in_codes(problem, seed: int):
    # With a base, and a K that its kind has.
    from peftkern.testing.bases import QUANTISED

    # Those of a dtype are SPECIAL_EVERY seeds apart, which may be a multiple of what divides the number of kinds.
    base, (_, step) = list(QUANTISED.items())[(seed + seed // SPECIAL_EVERY) % len(QUANTISED)]
    branch = {"branch": False} if hasattr(problem, "branch") else {}
    return dataclasses.replace(problem, base=base, K=-(-problem.K // step) * step, **branch)


def _single(dtype: torch.dtype, seed: int, kind: str, limits: dict):
    from peftkern.testing.problems import random_problem

    return random_problem(seed, dtype, large=kind == "large", **limits)


def _many(dtype: torch.dtype, seed: int, kind: str, limits: dict):
    from peftkern.testing.multi_problems import random_multi_problem

    # Sizes beside the one that is meant to be large, so that fp64 and the dropout masks take seconds.
    beside = {"segment": dict(max_KN=256), "rows": dict(max_KN=64, max_R=64, max_adapters=4)}.get(kind, {})
    problem = random_multi_problem(seed, dtype, **(beside | limits))
    if kind == "segment":
        return dataclasses.replace(problem, M=10_000, mix="one", base_share=0.0)
    if kind == "rows":
        mix = "skewed" if problem.mix == "base" else problem.mix
        return dataclasses.replace(problem, M=65_600, mix=mix)
    if kind == "base":
        return dataclasses.replace(problem, mix="base")
    if kind == "wide":
        return dataclasses.replace(
            problem, M=max(problem.M, 64), ranks=(512, 1), scalings=(problem.scalings * 2)[:2],
            dropout_p=(problem.dropout_p * 2)[:2], mix="uniform",
        )  # fmt: skip
    return problem


def _norm(dtype: torch.dtype, seed: int, kind: str, limits: dict):
    from peftkern.testing.norm_problems import random_norm_problem

    return random_norm_problem(seed, dtype, cancel=kind == "cancel", **limits)


def _rotate(dtype: torch.dtype, seed: int, kind: str, limits: dict):
    from peftkern.testing.rotate_problems import random_rotate_problem

    problem = random_rotate_problem(seed, dtype, **(({"max_KN": 128} if kind else {}) | limits))
    return dataclasses.replace(problem, M=20_000) if kind else problem


def _bottleneck(dtype: torch.dtype, seed: int, kind: str, limits: dict):
    from peftkern.testing.bottleneck_problems import random_bottleneck_problem

    problem = random_bottleneck_problem(seed, dtype, **(({"max_KN": 128, "max_R": 64} if kind else {}) | limits))
    return dataclasses.replace(problem, M=20_000) if kind else problem


_MAKE = {
    "lora_linear": _single, "multi_lora_linear": _many, "lora_row_norm": _norm, "block_rotate": _rotate,
    "bottleneck_adapter": _bottleneck,
}  # fmt: skip
SETS = {
    s.op: s
    for s in (
        ProblemSet(
            "lora_linear", "", ("large",), frozenset({"large"}), dict(max_M=96, max_KN=160, max_R=40),
            "with M K N above 2^31 or a weight in codes", codes=True,
        ),
        ProblemSet(
            "multi_lora_linear", "multi:", ("segment", "rows", "base", "wide"), frozenset({"segment", "rows", "wide"}),
            dict(max_M=96, max_KN=160, max_R=40, max_adapters=5, bottlenecks=False), "of special kinds", codes=True,
        ),
        ProblemSet(
            "lora_row_norm", "norm:", ("cancel",), frozenset(), dict(max_KN=160, max_R=40),
            "where W and the branch cancel or of a weight in codes", codes=True,
        ),
        ProblemSet(
            "block_rotate", "rotate:", ("tall",), frozenset({"tall"}), dict(max_M=96, max_KN=160, max_R=40),
            "of 20,000 rows",
        ),
        ProblemSet(
            "bottleneck_adapter", "bottleneck:", ("tall",), frozenset({"tall"}), dict(max_M=96, max_KN=160, max_R=40),
            "of 20,000 rows",
        ),
    )
}  # fmt: skip


def set_of(name: str) -> ProblemSet:
    """The set that a name belongs to."""
    return next((s for s in SETS.values() if s.prefix and name.startswith(s.prefix)), SETS["lora_linear"])
