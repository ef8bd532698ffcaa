"""Who computes a call: the one place that decides. What back ends can take is asked of them; what is preferred, and how it
is computed, is decided here from the settings and from what was measured (tuned, cpu_table)."""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Mapping
from types import ModuleType
from typing import NamedTuple

from ..bases.base import KINDS
from ..problem import CpuWay, Problem, TritonWay
from ..settings import Settings
from . import cpu_base, tuned

# The back ends of a device in the order in which they are asked; the reference computes what they leave.
BACKENDS = ("cpu", "cuda", "triton")
ORDER = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}


class Declined(RuntimeError):
    """The back end that ``PEFTKERN_BACKEND`` names cannot take a call."""


class Choice(NamedTuple):
    """Who computes a problem. ``way``: what that back end is told of how, None if it has one way alone.

    ``declined``: the back ends that were asked before, and why they do not; ``why``: one sentence on who does, and how.
    """

    backend: str
    way: CpuWay | TritonWay | None
    declined: Mapping[str, str]
    why: str


# The only lazy import of the package: a back end loads at its first use, so `import peftkern` stays light.
@functools.cache
def load(name: str) -> ModuleType:
    """The back end module of that name."""
    return importlib.import_module(f"peftkern.backends.{name}")


@functools.lru_cache(maxsize=4096)
def choose(problem: Problem, now: Settings) -> Choice:
    """Who computes this problem under these settings, and how.

    Raises Declined when ``PEFTKERN_BACKEND`` names a back end that cannot take it.
    """
    if now.backend == "reference":
        return Choice("reference", None, {}, "PEFTKERN_BACKEND=reference")
    declined: dict[str, str] = {}
    for name in ORDER.get(problem.device, ()) if now.backend == "auto" else (now.backend,):
        reason = _unable(name, problem, now) or _not_preferred(name, problem, now)
        if reason is None:
            way, why = _way(name, problem, now)
            named = "" if now.backend == "auto" else f"PEFTKERN_BACKEND={name}; "
            return Choice(name, way, declined, named + why)
        declined[name] = reason
    if now.backend != "auto":
        raise Declined(f"PEFTKERN_BACKEND={now.backend} cannot take {problem}: {declined[now.backend]}")
    return Choice("reference", None, declined, "no back end takes it")


def _unable(name: str, problem: Problem, now: Settings) -> str | None:
    module = load(name)
    reason = module.unavailable(now)
    if reason is None and problem.op not in module.OPS:
        reason = f"has no kernel for {problem.op}"
    # Dense is not named among the flags.
    for kind in problem.flags & KINDS.keys() - set(module.BASES) if reason is None else ():
        reason = f"has no kernel that reads a base of kind {kind}"
    return module.decline(problem, now) if reason is None else reason


def _not_preferred(name: str, problem: Problem, now: Settings) -> str | None:
    # The CUDA kernels take what they were measured to be fastest at, and all that they can where they are named. A mask
    # is one pass whoever makes it: nobody measured that.
    if name != "cuda" or now.backend == "cuda" or problem.op == "dropout_mask":
        return None
    if problem.op == "multi_lora_linear_fwd":
        # What differs between the candidates is the branch, and that was measured.
        problem = dataclasses.replace(problem, op="sgmv_add")
    measured = tuned.entry(problem, now)
    if measured is not None and measured.candidate == "cuda":
        return None
    return "no measurement on this GPU says that it is the fastest"


def _way(name: str, problem: Problem, now: Settings) -> tuple[CpuWay | TritonWay | None, str]:
    if name == "cpu":
        return _cpu_way(problem, now)
    if name == "triton":
        return _triton_way(problem, now)
    return None, "the CUDA kernels, measured to be fastest on this GPU" if now.backend == "auto" else "the CUDA kernels"


def _cpu_way(problem: Problem, now: Settings) -> tuple[CpuWay, str]:
    product, on = cpu_base.product_of(problem), cpu_base.this_cpu(now.cpu_isa, now.tables)
    if problem.op in cpu_base.BOTTLENECKS:
        kind, why = cpu_base.bottleneck_kind(problem, on, now)
        return CpuWay(now, kind, kind), f"products {kind}: {why}"
    pairs = cpu_base.branch_in_bf16(problem, on, now)
    branch = "; branch by products of bf16" if pairs else ""
    if product is None:
        return CpuWay(now, pairs=pairs), f"the C++ kernels, there is no base product{branch}"
    kind, why = cpu_base.choose_kind(product, on, now)
    strided, _ = cpu_base.choose_kind(product._replace(unit_stride=False), on, now)
    return CpuWay(now, kind, strided, pairs), f"base product {kind}: {why}{branch}"


def _triton_way(problem: Problem, now: Settings) -> tuple[TritonWay, str]:
    fixed, why = dict(now.triton_fixed), "launches by size (kernels/tl/configs.py)"
    if problem.op in ("lora_linear_fwd", "lora_linear_bwd"):
        from ..kernels import configs

        measured = tuned.entry(problem, now)
        if measured is not None and measured.candidate in configs.BASES:
            found = {"base": measured.candidate}
            if measured.config:
                found["gemm"] = configs.LaunchConfig(**measured.config)
            fixed, why = found | fixed, f"base product {measured.candidate}: measured to be fastest on this GPU"
    if now.triton_fixed:
        why += "; triton_fixed is set"
    return TritonWay(now.batch_invariant, tuple(sorted(fixed.items()))), why
