"""The one dispatch point: an op name and its arguments in, one back end out.

``define`` registers an op with torch.library: its schema, its shape rule (fake) and, for every device, ``_run``,
which asks the back ends of the device in order and ends at the reference. Autograd lives above (peftkern.autograd).
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch

from . import settings
from .problem import Problem

log = logging.getLogger("peftkern")

LIBRARY = torch.library.Library("peftkern", "FRAGMENT")

# The only lazy import of the package: a back end loads at its first use, so `import peftkern` stays light.
BACKENDS = ("cpu", "cuda", "triton")
ORDER = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}


@dataclass(frozen=True)
class Op:
    """A registered op: ``describe`` checks the arguments and makes their Problem, ``reference`` defines the result.

    ``describe`` may look at dtypes, shapes, devices and Python values, never at a tensor's values: its outcome is kept.
    """

    name: str
    reference: Callable
    describe: Callable[..., Problem]


OPS: dict[str, Op] = {}


def define(name: str, schema: str, *, reference: Callable, fake: Callable, describe: Callable[..., Problem]) -> None:
    """Register ``peftkern::name`` with the given schema for every device."""
    op = Op(name, reference, describe)
    OPS[name] = op
    LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, functools.partial(_run, op), "CompositeExplicitAutograd")
    torch.library.register_fake(f"peftkern::{name}", fake, lib=LIBRARY)


@functools.cache
def load(name: str) -> ModuleType:
    """The back end module of that name."""
    return importlib.import_module(f"peftkern.backends.{name}")


def choose(problem: Problem) -> tuple[str, dict[str, str]]:
    """Name of the back end that takes this problem, and the reasons of those that declined.

    Raises RuntimeError when ``PEFTKERN_BACKEND`` names one that cannot take it.
    """
    wanted = settings.backend()
    if wanted == "reference":
        return wanted, {}
    declined: dict[str, str] = {}
    for name in ORDER.get(problem.device, ()) if wanted == "auto" else (wanted,):
        module = load(name)
        reason = module.unavailable()
        if reason is None:
            reason = module.decline(problem) if problem.op in module.OPS else f"has no kernel for {problem.op}"
        if reason is None:
            return name, declined
        declined[name] = reason
    if wanted != "auto":
        raise RuntimeError(f"PEFTKERN_BACKEND={wanted} cannot take {problem}: {declined[wanted]}")
    return "reference", declined


@functools.lru_cache(maxsize=4096)
def _log_once(problem: Problem, name: str, declined: tuple[tuple[str, str], ...]) -> None:
    log.debug("%s -> %s%s", problem, name, "".join(f"; {n}: {why}" for n, why in declined))


_problems: dict[tuple, Problem] = {}


def _signature(value):
    # All of a tensor that checks and problems may depend on: never its values, strides or address.
    if isinstance(value, torch.Tensor):
        return type(value), value.shape, value.dtype, value.device, value.layout
    if isinstance(value, list):
        return tuple(map(_signature, value))
    return type(value), value


def _describe(op: Op, args) -> Problem:
    # The checks cost as much as a kernel of a small layer, and their outcome repeats from step to step.
    key = (op.name, *map(_signature, args))
    problem = _problems.get(key)
    if problem is None:
        problem = op.describe(*args)
        if len(_problems) >= 4096:
            _problems.clear()
        _problems[key] = problem
    return problem


def _run(op: Op, *args):
    problem = _describe(op, args)
    name, declined = choose(problem)
    if log.isEnabledFor(logging.DEBUG):
        _log_once(problem, name, tuple(declined.items()))
    function = op.reference if name == "reference" else load(name).OPS[op.name]
    # An op's arithmetic is fixed by its arguments: autocast has had its say in the layer above.
    device = problem.device
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    with torch.no_grad():
        if not autocast:
            return function(*args)
        with torch.autocast(device, enabled=False):
            return function(*args)
