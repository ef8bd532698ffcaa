"""The one dispatch point: an op name and its arguments in, one back end out.

``define`` registers an op with torch.library: its schema, its shape rule (fake) and, for every device, ``_run``,
which asks the back ends of the device in order and ends at the reference. Autograd lives above (peftkern.autograd) and
calls an op through ``caller``.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_map

from .. import settings
from ..problem import Problem

log = logging.getLogger("peftkern")

LIBRARY = torch.library.Library("peftkern", "FRAGMENT")

# The only lazy import of the package: a back end loads at its first use, so `import peftkern` stays light.
BACKENDS = ("cpu", "cuda", "triton")
ORDER = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}


@dataclass(frozen=True)
class Op:
    """A registered op: ``describe`` checks the arguments and makes their Problem, ``reference`` defines the result.

    ``flops(problem, *args)``: what torch's flop counter counts, 2 for each product and sum of a matrix product.
    ``describe`` may look at dtypes, shapes, devices and Python values, never at a tensor's values: its outcome is kept.
    """

    name: str
    reference: Callable
    describe: Callable[..., Problem]
    flops: Callable[..., int]


class Declined(RuntimeError):
    """The back end that ``PEFTKERN_BACKEND`` names cannot take a call."""


OPS: dict[str, Op] = {}


def define(
    name: str,
    schema: str,
    *,
    reference: Callable,
    fake: Callable,
    describe: Callable[..., Problem],
    flops: Callable[..., int] = lambda problem, *args: 0,
) -> None:
    """Register ``peftkern::name`` with the given schema for every device."""
    op = Op(name, reference, describe, flops)
    OPS[name] = op
    LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, functools.partial(_run, op), "CompositeExplicitAutograd")
    torch.library.register_fake(f"peftkern::{name}", fake, lib=LIBRARY)
    torch.library.register_vmap(f"peftkern::{name}", functools.partial(_one_by_one, name), lib=LIBRARY)
    LIBRARY.impl(name, functools.partial(_legacy_one_by_one, name), "Batched")


def _one_by_one(name: str, info, in_dims, *args):
    # What vmap makes of an op in backward: a call for each of the output gradients.
    def pick(value, dim, i: int):
        if isinstance(value, list):
            return [pick(v, d, i) for v, d in zip(value, dim, strict=True)]
        return value if dim is None else value.select(dim, i)

    op = getattr(torch.ops.peftkern, name).default
    each = [op(*map(pick, args, in_dims, [i] * len(args))) for i in range(info.batch_size)]
    outs = tree_map(lambda *outs: torch.stack(outs), *each)
    return outs, tree_map(lambda _: 0, outs)


class _Batch(NamedTuple):
    batch_size: int


def _legacy_one_by_one(name: str, *args):
    # The same for the older vmap, which is_grads_batched and jacobian(vectorize=True) use.
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    batched = torch._C._functorch.is_legacy_batchedtensor
    dims = tree_map(lambda v: 0 if isinstance(v, torch.Tensor) and batched(v) else None, args)
    plain = tree_map(lambda v, dim: v if dim is None else torch._remove_batch_dim(v, level, 0, dim), args, dims)
    size = next(v.shape[0] for v, dim in zip(plain, dims, strict=True) if dim == 0)
    outs, _ = _one_by_one(name, _Batch(size), dims, *plain)
    return tree_map(lambda out: torch._add_batch_dim(out, 0, level), outs)


@functools.cache
def load(name: str) -> ModuleType:
    """The back end module of that name."""
    return importlib.import_module(f"peftkern.backends.{name}")


def choose(problem: Problem) -> tuple[str, dict[str, str]]:
    """Name of the back end that takes this problem, and the reasons of those that declined.

    Raises Declined when ``PEFTKERN_BACKEND`` names one that cannot take it.
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
        raise Declined(f"PEFTKERN_BACKEND={wanted} cannot take {problem}: {declined[wanted]}")
    return "reference", declined


# What took a call, by settings and all that checks and problems may depend on. They cost as much as a kernel of a small
# layer, and their outcome repeats from step to step.
_takers: dict[tuple, _Taker] = {}

_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter))


class _Taker(NamedTuple):
    function: Callable
    device: str
    # Ordinary tensors alone, in memory that holds what they mean.
    plain: bool


class FixedList(list):
    """A list of tensors that stays as it is, and they too in all but their values: it is looked at once."""

    __slots__ = ("_known",)

    def signature(self) -> object:
        """Equal for lists that no check tells apart; cheap to hash."""
        try:
            return self._known
        except AttributeError:
            self._known = _fixed.setdefault(tuple(map(_signature, self)), object())
            return self._known


_fixed: dict[tuple, object] = {}


def _signature(value):
    # Of a tensor never its values, strides or address.
    if type(value) is FixedList:
        return value.signature()
    if isinstance(value, torch.Tensor):
        return type(value), value.shape, value.dtype, value.device, value.layout
    if isinstance(value, list):
        return tuple(map(_signature, value))
    return type(value), value


def _is_plain(value) -> bool:
    if isinstance(value, list):
        return all(map(_is_plain, value))
    if not isinstance(value, torch.Tensor):
        return True
    return type(value) in _PLAIN and value.layout == torch.strided and value.device.type in ORDER


def _function(module: ModuleType, problem: Problem) -> Callable:
    # A back end with several ways to compute a problem may choose among them once, here.
    choose_way = getattr(module, "function", None)
    return module.OPS[problem.op] if choose_way is None else choose_way(problem)


def _find(op: Op, args) -> _Taker:
    problem = op.describe(*args)
    name, declined = choose(problem)
    log.debug("%s -> %s%s", problem, name, "".join(f"; {n}: {why}" for n, why in declined.items()))
    function = op.reference if name == "reference" else _function(load(name), problem)
    return _Taker(function, problem.device, all(map(_is_plain, args)))


def _taker(op: Op, args) -> _Taker:
    key = (op.name, settings.current(), *map(_signature, args))
    taker = _takers.get(key)
    if taker is None:
        taker = _find(op, args)
        # A new entry of _fixed always makes one here too.
        if len(_takers) >= 4096:
            forget()
        _takers[key] = taker
    return taker


def forget() -> None:
    """Ask the back ends again at the next call of everything, after a change that is no setting."""
    _takers.clear()
    _fixed.clear()


@functools.cache
def _has_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device)


def _apply(taker: _Taker, args):
    device = taker.device
    # An op's arithmetic is fixed by its arguments: autocast has had its say in the layer above.
    autocast = _has_autocast(device) and torch.is_autocast_enabled(device)
    if not autocast and not torch.is_grad_enabled():
        return taker.function(*args)
    with torch.no_grad(), torch.autocast(device, enabled=False) if autocast else contextlib.nullcontext():
        return taker.function(*args)


def _run(op: Op, *args):
    return _apply(_taker(op, args), args)


def watched() -> bool:
    """Whether a compiler, a tracer, a mode, a transform or a profiler wants to see which ops are called."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._functorch.maybe_current_level() is not None
        or torch._C._get_tracing_state() is not None
        or torch.autograd._profiler_enabled()
    )


def _tell_flop_counters() -> None:
    # torch's flop counter takes half a second to import, so its table hears of our ops when somebody else has imported
    # it; a counter that runs already has a copy of the table.
    counting = sys.modules.get("torch.utils.flop_counter")
    if counting is None:
        return
    counters = [getattr(mode, "counter", None) for mode in _get_current_dispatch_mode_stack()]
    tables = [counting.flop_registry, *(c.flop_registry for c in counters if isinstance(c, counting.FlopCounterMode))]
    for op in OPS.values():
        packet = getattr(torch.ops.peftkern, op.name)
        for table in tables:
            table.setdefault(packet, functools.partial(_flops, op))


def _flops(op: Op, *args, out_val) -> int:
    return op.flops(op.describe(*args), *args)


def caller(name: str) -> Callable:
    """The op ``name`` for the layers above, who see to gradients: straight to its back end where nobody is watching.

    The way through torch's dispatcher and back takes as long as the kernels of a small layer.
    """
    op, overload = OPS[name], getattr(torch.ops.peftkern, name).default

    def call(*args):
        if watched() or torch._C._functorch.is_legacy_batchedtensor(args[0]):
            if not torch.compiler.is_compiling():
                _tell_flop_counters()
            return overload(*args)
        taker = _taker(op, args)
        return _apply(taker, args) if taker.plain else overload(*args)

    return call
