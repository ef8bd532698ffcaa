"""Whether a call of the model reaches a layer: where it does not, an adapter would have no effect, without a word."""

from __future__ import annotations

import dis
import inspect
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import pairwise
from types import CodeType, FunctionType

from torch import nn

Edge = tuple[nn.Module, str, nn.Module]


def edges(model: nn.Module, names: Iterable[str]) -> list[Edge]:
    """(parent, name, child) for each step from the model to its modules of these names, every step once."""
    found: dict[tuple[nn.Module, str], nn.Module] = {}
    for name in names:
        parent = model
        for step in name.split("."):
            found[parent, step] = parent = parent._modules[step]
    return [(parent, step, child) for (parent, step), child in found.items()]


def check_in_place(steps: list[Edge]) -> None:
    """Raise RuntimeError if a module on the way to a layer was replaced, and not by one that goes on to call it."""
    for parent, step, child in steps:
        held = parent._modules.get(step)
        if held is not child and (held is None or all(m is not child for m in held.modules())):
            raise RuntimeError(
                f"{type(parent).__name__}.{step} was replaced since its adapters were attached (as "
                "resize_token_embeddings does with a head), so that they would have no effect: detach(), and attach anew"
            )


def bypass(name: str, modules: dict[str, nn.Module]) -> str | None:
    """Why the module around this layer never calls it, or None if it may."""
    parent, _, child = name.rpartition(".")
    cls = type(modules[parent])
    if issubclass(cls, nn.TransformerEncoderLayer):
        return "belongs to a torch.nn.TransformerEncoderLayer, whose fast path takes the weight and calls no layer"
    if _only_reads(cls, child):
        return f"is never called: {cls.__module__}.{cls.__qualname__} takes its weight"
    return None


@cache
def _only_reads(cls: type, child: str) -> bool:
    """Whether the methods of a class take ``self.child.weight`` and use the child in no other way."""
    uses = set()
    for base in cls.__mro__[: cls.__mro__.index(nn.Module)]:
        for name, method in vars(base).items():
            method = inspect.unwrap(method) if callable(method) else None
            if isinstance(method, FunctionType) and name != "__init__":
                uses |= set(_uses(method.__code__, child))
    return "weight" in uses and uses <= {"weight", "bias"}


def _uses(code: CodeType, child: str) -> Iterator[str | None]:
    """What follows each ``.child``: the name of its attribute, or None for anything else."""
    steps = dis.get_instructions(code) if child in code.co_names else ()
    for step, after in pairwise(step for step in steps if step.opname != "EXTENDED_ARG"):
        if step.opname in ("LOAD_ATTR", "LOAD_METHOD") and step.argval == child:
            yield after.argval if after.opname == "LOAD_ATTR" else None
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _uses(constant, child)
