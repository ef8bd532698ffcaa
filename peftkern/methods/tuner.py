"""What the layers of HF PEFT have in common: their state, their base layer, the adapters of a call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from ..bases.base import Base
from .look import PLAIN_TENSORS, Look, NotCovered
from .quantised import Frozen, read, reader_of
from .registry import Method, Plan, loaded, method_of


def plan(look: Look, method: Method, mixed: Iterable[str] | None = None) -> Plan:
    """What a call of this layer computes; ``mixed``: the adapters of a batch in which each row takes one of them."""
    nested = levels(look)
    for level in nested:
        check_state(level)
    kind, uncast = None, False
    if method.base is None:
        weight, bias, uncast = base(nested[-1])
    else:
        weight, bias, kind = method.base(look)
    held = []
    for level in reversed(nested):  # each level works on what the one inside it gives
        of = method_of(type(level.module))
        if of.one_active and mixed is None and len(_asked(level, None)) > 1:
            raise NotCovered("it has several active adapters")
        held += [of.held(level, name, weight.shape) for name in adapters(level, of.adapters, mixed)]
    if isinstance(weight, Base):
        for h in held:
            if h.method.dense or h.folds:
                raise NotCovered(f"{h.method.name} on a base of kind {weight.kind} is not covered")
    if mixed is not None and len({h.name for h in held}) < len(held):
        raise NotCovered("layers around each other have adapters of the same name")
    if not held:
        raise NotCovered(_without_adapter(look, method.adapters, mixed))
    return Plan(weight, bias, held, kind, uncast)


def levels(look: Look) -> list[Look]:
    """The layer and the layers around which it stands, the outermost first, as far as a plan takes them together."""
    found, method = [look], method_of(type(look.module))
    while method.nests:
        part = look.part("base_layer")
        method = None if part is None else method_of(type(part.module))
        if method is None or not method.nests:
            break
        part.require(type(part.module), "base_layer")
        found.append(part)
        look = part
    return found


DISABLED = "its adapters are disabled"


def check_state(look: Look) -> None:
    """Refuse a layer whose adapters do not act, or are in the weight already."""
    if look.value("_disable_adapters", False):
        raise NotCovered(DISABLED)
    if look.value("merged_adapters"):
        raise NotCovered("its adapters are merged into the base weight")


def plain_or_none(t: Any) -> bool:
    """Whether this is a tensor of torch's own types, or None."""
    return t is None or type(t) in PLAIN_TENSORS


def base(look: Look) -> Frozen:
    """The base layer, an nn.Linear, transformers' Conv1D or one of a library that quantises, without a gradient that is
    not kept."""
    part = look.part("base_layer")
    if part is None:
        raise NotCovered("it has no base_layer")
    reader = reader_of(part.module)
    if reader is not None:
        return read(part, reader)
    cls = type(part.module)
    transposed = cls is not nn.Linear and cls is loaded("transformers.pytorch_utils.Conv1D")
    part.require(cls if transposed else nn.Linear, "base_layer")
    weight, bias = frozen_tensors(part)
    if weight.dim() != 2:
        raise NotCovered(f"the base weight has shape {tuple(weight.shape)}")
    return Frozen(part.transposed(weight) if transposed else weight, bias)


def frozen_tensors(part: Look) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a base layer, both without a gradient that is not kept; the weight is frozen."""
    weight, bias = (
        part.tensor("weight", frozen=True),
        None if isinstance(part.module, nn.Embedding) else part.tensor("bias"),
    )
    if type(weight) not in PLAIN_TENSORS or not plain_or_none(bias):
        raise NotCovered(f"the base weight is a {type(weight).__name__}, not a plain tensor")
    weight = part.without_gradient("weight", weight)
    if weight.requires_grad:
        raise NotCovered("the base weight requires grad")
    return weight, None if bias is None else part.without_gradient("bias", bias)


def alone(look: Look) -> bool:
    """Whether a layer has one active adapter."""
    return len(_asked(look, None)) == 1


def _asked(look: Look, mixed: Iterable[str] | None) -> list[str]:
    active = look.value("_active_adapter")
    return list(mixed) if mixed is not None else [active] if isinstance(active, str) else active


def adapters(look: Look, held_by: str, mixed: Iterable[str] | None) -> list[str]:
    """The adapters of a call that the layer has: the active ones, or those of a mixed batch.

    ``held_by``: name of the dict that has an entry for each adapter, or names with spaces between, of which one has.
    """
    asked, parts = _asked(look, mixed), [look.part(part) for part in held_by.split()]
    return [name for name in asked if any(part.holds(name) for part in parts)]


def _without_adapter(look: Look, held_by: str, mixed: Iterable[str] | None) -> str:
    # Why a call has none of the layer's adapters.
    asked, present = _asked(look, mixed), [name for part in held_by.split() for name in look.part(part).module]
    whose = "active" if mixed is None else "batch's"
    if not asked:
        return "it has no active adapter" if mixed is None else "it has no adapter of the batch"
    if not present:
        return "it has no adapter"
    asked, present = (", ".join(f"{n!r}" for n in names) for names in (asked, present))
    return f"it has none of the {whose} adapters ({asked}), it has {present}"


def number(scaling: Any, name: str) -> float | Tensor:
    """A scaling that is one number."""
    if type(scaling) is float:
        return scaling
    if isinstance(scaling, Tensor):
        if type(scaling) not in PLAIN_TENSORS or scaling.numel() != 1 or not scaling.is_floating_point():
            raise NotCovered(f"the scaling of {name!r} is not one number")
    elif isinstance(scaling, bool) or not isinstance(scaling, (int, float)):
        raise NotCovered(f"the scaling of {name!r} is a {type(scaling).__name__}")
    return scaling


def tensors(look: Look, name: str, shapes: Mapping[str, tuple[int | None, ...] | None]) -> list[Tensor]:
    """An adapter's tensors in these dicts of the layer, all of one dtype. None: any size, or any shape."""
    found = []
    for held_by, shape in shapes.items():
        part = look.part(held_by)
        t = part.tensor(name) if part is not None and part.holds(name) else None
        if type(t) not in PLAIN_TENSORS:
            raise NotCovered(f"{held_by} of {name!r} is no plain tensor")
        if shape is not None and (len(shape) != t.dim() or any(n not in (None, m) for n, m in zip(shape, t.shape))):
            raise NotCovered(f"{held_by} of {name!r} has shape {tuple(t.shape)}, expected {shape}")
        found.append(t)
    if len({t.dtype for t in found}) > 1:
        raise NotCovered(f"the tensors of {name!r} differ in dtype")
    return found


def drop_probability(look: Look, held_by: str, name: str) -> float:
    """p of an adapter's dropout module in this dict of the layer, 0 where it does not act."""
    dropout = look.part(held_by).part(name)
    if dropout is None:
        raise NotCovered(f"adapter {name!r} lacks a part")
    if type(dropout.module) is nn.Identity:
        dropout.require(nn.Identity, held_by)
        return 0.0
    dropout.require(nn.Dropout, held_by)
    p = dropout.value("p")
    if dropout.value("inplace") or not 0.0 <= p < 1.0:
        raise NotCovered(f"the dropout of {name!r} is in place or drops everything")
    return p if dropout.value("training") else 0.0


def layer(linear: nn.Module, config: Any, *more: Any) -> nn.Module:
    """A model of this layer alone, with an adapter for each of these PEFT configs, all of them active."""
    import peft

    model = peft.get_peft_model(nn.Sequential(linear), config)
    for name, another in enumerate(more):
        model.add_adapter(str(name), another)
    if more:
        model.base_model.set_adapter(list(model.peft_config))
    return model


def builder(config: str, rank: str | None = "r", **options: Any) -> Callable[[nn.Module, int], nn.Module]:
    """What makes a model of one layer with PEFT's config of this name; ``rank``: the config's name for R, if it has one."""

    def build(base: nn.Module, R: int) -> nn.Module:
        import peft

        ranked = {} if rank is None else {rank: R}
        return layer(base, getattr(peft, config)(target_modules=["0"], **ranked, **options))

    return build
