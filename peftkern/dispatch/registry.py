"""The one dispatch point: an op name and its arguments in, one back end out.

``define`` registers an op with torch.library: its schema, its shape rule (fake) and, for every device, ``_run``,
which hands it to who computes it (choose.py). Autograd lives above (peftkern.autograd) and
calls an op through ``caller``.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_map

from .. import settings
from ..problem import Problem
from .choose import ORDER, choose, load
from .watch import no_tangents, nobody_watches

log = logging.getLogger("peftkern")

LIBRARY = torch.library.Library("peftkern", "FRAGMENT")


@dataclass(frozen=True)
class Op:
    """A registered op. Every function of it takes the arguments as one ``arguments`` tuple.

    ``describe`` checks them and makes their Problem, ``reference`` defines the result; ``flops(problem, arguments)``: what
    torch's flop counter counts, 2 for each product and sum of a matrix product. ``describe`` may look at dtypes, shapes,
    devices and Python values, never at a tensor's values: its outcome is kept.
    """

    name: str
    arguments: type
    reference: Callable
    describe: Callable[[Any], Problem]
    flops: Callable[[Problem, Any], int]


OPS: dict[str, Op] = {}


# Types of an op's arguments: an int that is a tensor's size, a tensor that the op changes.
Size = int
Out = torch.Tensor
# What a field of an op's arguments is to torch.
_SCHEMA = {
    "Tensor": "Tensor", "Tensor | None": "Tensor?", "Out": "Tensor(a!)", "list[Tensor]": "Tensor[]",
    "list[Tensor] | None": "Tensor[]?",
    "list[Tensor | None]": "Tensor?[]", "list[bool]": "bool[]", "list[bool] | None": "bool[]?", "bool": "bool", "int": "int",
    "Size": "SymInt",
    "float": "float", "str": "str",
}  # fmt: skip
_DEFAULTS = {"": '""', None: "None", False: "False"}


def schema_of(arguments: type, returns: str) -> str:
    """torch's schema of an op that takes the fields of a NamedTuple (its annotations unevaluated) in their order."""
    kinds = {name: getattr(kind, "__forward_arg__", kind) for name, kind in arguments.__annotations__.items()}
    given = {name: f"={_DEFAULTS[value]}" for name, value in arguments._field_defaults.items()}
    fields = ", ".join(f"{_SCHEMA[kind]} {name}{given.get(name, '')}" for name, kind in kinds.items())
    return f"({fields}) -> {returns}"


def define(
    name: str,
    arguments: type,
    returns: str,
    *,
    reference: Callable,
    fake: Callable,
    describe: Callable[[Any], Problem],
    flops: Callable[[Problem, Any], int] = lambda problem, arguments: 0,
) -> None:
    """Register ``peftkern::name``, with a schema made of the NamedTuple ``arguments``, for every device."""
    op = Op(name, arguments, reference, describe, flops)
    OPS[name] = op
    LIBRARY.define(name + schema_of(arguments, returns), tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, functools.partial(_run, op), "CompositeExplicitAutograd")
    torch.library.register_fake(f"peftkern::{name}", lambda *args: fake(arguments(*args)), lib=LIBRARY)
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


# What took a call, by settings and all that checks and problems may depend on. They cost as much as a kernel of a small
# layer, and their outcome repeats from step to step.
takers: dict[tuple, _Taker] = {}

_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter))


class _Taker(NamedTuple):
    function: Callable
    device: str
    # Ordinary tensors alone, in memory that holds what they mean.
    plain: bool


def _signature(value):
    # Of a tensor never its values, strides or address.
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


def _find(op: Op, args, now: settings.Settings) -> _Taker:
    problem = op.describe(op.arguments(*args))
    name, way, declined, _ = choose(problem, now)
    log.debug("%s -> %s%s", problem, name, "".join(f"; {n}: {why}" for n, why in declined.items()))
    function = op.reference if name == "reference" else load(name).OPS[problem.op]
    if way is not None:
        function = functools.partial(function, way=way)
    return _Taker(function, problem.device, all(map(_is_plain, args)))


def _taker(op: Op, args) -> _Taker:
    now = settings.current()
    key = (op.name, now, *map(_signature, args))
    taker = takers.get(key)
    if taker is None:
        taker = _find(op, args, now)
        if len(takers) >= 4096:
            takers.clear()
        takers[key] = taker
    return taker


@functools.cache
def _has_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device)


def _apply(taker: _Taker, arguments):
    device = taker.device
    # An op's arithmetic is fixed by its arguments: autocast has had its say in the layer above.
    autocast = _has_autocast(device) and torch.is_autocast_enabled(device)
    if not autocast and not torch.is_grad_enabled():
        return taker.function(arguments)
    with torch.no_grad(), torch.autocast(device, enabled=False) if autocast else contextlib.nullcontext():
        return taker.function(arguments)


def _run(op: Op, *args):
    no_tangents(op.name.removesuffix("_fwd").removesuffix("_bwd"), args)
    return _apply(_taker(op, args), op.arguments(*args))


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
    arguments = op.arguments(*args)
    return op.flops(op.describe(arguments), arguments)


def caller(name: str) -> Callable:
    """The op ``name`` for the layers above, who see to gradients: straight to its back end where nobody is watching.

    The way through torch's dispatcher and back takes as long as the kernels of a small layer.
    """
    op, overload = OPS[name], getattr(torch.ops.peftkern, name).default

    def call(*args):
        first = args[0] if isinstance(args[0], torch.Tensor) else args[0][0]
        if not nobody_watches() or torch._C._functorch.is_legacy_batchedtensor(first):
            if not torch.compiler.is_compiling():
                _tell_flop_counters()
            return overload(*args)
        taker = _taker(op, args)
        return _apply(taker, op.arguments(*args)) if taker.plain else overload(*args)

    return call
