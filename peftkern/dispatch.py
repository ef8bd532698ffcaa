"""The one dispatch point: an op name and its arguments in, one back end out.

``define`` registers an op with torch.library: its schema, its shape rule (fake) and, for every device, ``_run``,
which asks the back ends of the device in order and ends at the reference. Autograd lives above (peftkern.autograd).
"""

from __future__ import annotations

import contextlib
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
    wanted = settings.current().backend
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


# What took a call, by settings and all that checks and problems may depend on. They cost as much as a kernel of a small
# layer, and their outcome repeats from step to step.
_takers: dict[tuple, tuple[Callable, str]] = {}


def _signature(value):
    # Of a tensor never its values, strides or address.
    if isinstance(value, torch.Tensor):
        return type(value), value.shape, value.dtype, value.device, value.layout
    if isinstance(value, list):
        return tuple(map(_signature, value))
    return type(value), value


def _find(op: Op, args) -> tuple[Callable, str]:
    """The function that takes a call, and its device."""
    problem = op.describe(*args)
    name, declined = choose(problem)
    log.debug("%s -> %s%s", problem, name, "".join(f"; {n}: {why}" for n, why in declined.items()))
    return op.reference if name == "reference" else load(name).OPS[op.name], problem.device


@functools.cache
def _has_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device)


def _run(op: Op, *args):
    key = (op.name, settings.current(), *map(_signature, args))
    taker = _takers.get(key)
    if taker is None:
        taker = _find(op, args)
        if len(_takers) >= 4096:
            _takers.clear()
        _takers[key] = taker
    function, device = taker
    # An op's arithmetic is fixed by its arguments: autocast has had its say in the layer above.
    autocast = _has_autocast(device) and torch.is_autocast_enabled(device)
    if not autocast and not torch.is_grad_enabled():
        return function(*args)
    with torch.no_grad(), torch.autocast(device, enabled=False) if autocast else contextlib.nullcontext():
        return function(*args)
