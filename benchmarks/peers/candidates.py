"""peftkern's ways to compute one op on a GPU, each forced, so that a table shows them side by side.

Each names a back end (PEFTKERN_BACKEND) and, for Triton, who computes the base product (``kernels/tl/configs.py``), or
what dispatch is to take as measured (``tuned.py``): then ops that the back end has no kernel for go where they go. All
this holds for the process while a step runs, its backward pass included.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from peftkern.dispatch.choose import load
from peftkern.problem import Problem, device_arch
from peftkern.settings import current, using

from ..core.case import Case

NOT_HERE = "not here: "


@dataclass(frozen=True)
class Candidate:
    """``suffix`` ends the provider's name; ``base``: see ``kernels.configs.BASES``, None for its own choice; ``only``:
    the back end takes every op, or fails."""

    suffix: str
    title: str
    backend: str
    base: str | None = None
    only: bool = True


LINEAR = (
    Candidate("cuda", "CUDA", "cuda"),
    Candidate("fused", "Triton, one kernel", "triton", "fused"),
    Candidate("epilogue", "Triton, vendor's product and a pass", "triton", "epilogue"),
    Candidate("overlap", "the same, u on a second stream", "triton", "overlap"),
    Candidate("addmm", "Triton, vendor's product and addmm_", "triton", "addmm"),
)
# The route of a batch is made once for all layers, and not by the CUDA kernels.
MULTI = (Candidate("cuda", "CUDA", "cuda", only=False), Candidate("triton", "Triton", "triton"))
# Few rows over a weight in codes.
CODED = (Candidate("cuda", "CUDA", "cuda"), Candidate("triton", "Triton", "triton"))


@contextlib.contextmanager
def active(candidate: Candidate) -> Iterator[None]:
    """The candidate's settings in force inside."""
    changes = {"backend": candidate.backend} if candidate.only else {"backend": "auto", "candidate": candidate.backend}
    if candidate.base is not None:
        changes["triton_fixed"] = importlib.import_module("peftkern.kernels.configs").fixed(base=candidate.base)
    with using(**changes):
        yield


def unusable(candidate: Candidate, ops: tuple[str, ...], kind: str = "dense") -> Callable[[Case], str | None]:
    """A function that says why the candidate cannot run a case over a base of that kind, with NOT_HERE in front, or None."""

    def reason(case: Case) -> str | None:
        why = _why(candidate, ops, case, kind)
        return None if why is None else NOT_HERE + why

    return reason


def _why(candidate: Candidate, ops: tuple[str, ...], case: Case, kind: str) -> str | None:
    back_end = load(candidate.backend)
    why = back_end.unavailable(current())
    if why is not None:
        return why
    lacking = [op for op in ops if op not in back_end.OPS]
    if lacking:
        return f"back end {candidate.backend} has no kernel for {', '.join(lacking)}"
    if candidate.base == "addmm" and case.adapter_dtype != case.dtype:
        return "addmm_ takes adapters in the activation's dtype"
    flags = frozenset({"base", kind} | ({"dropout"} if case.dropout else set())) - {"dense"}
    arch = device_arch(case.device, None)
    with active(candidate):
        for op in ops:
            problem = Problem(
                op, case.device, arch, case.dtype, case.adapter_dtype, case.M, case.N, case.K, case.R, flags
            )  # fmt: skip
            why = back_end.decline(problem, current())
            if why is not None:
                return f"back end {candidate.backend}: {why}"
    return None
