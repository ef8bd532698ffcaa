"""A look at a layer's parts that writes down what it saw.

A plan of a layer reads everything through a ``Look``. So the pattern of what was read is complete by construction: as long
as the layer matches it, the plan would come out the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .unchanged import ABSENT, EMPTY, Pattern, equal, instance, items, keep, same

PLAIN_TENSORS = (Tensor, nn.Parameter)
_NO_HOOKS = dict.fromkeys(("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"), EMPTY)


class NotCovered(Exception):
    """Why a layer runs the library's own code. The message reads on after the name of the layer."""


def read(module: nn.Module, name: str) -> Any:
    """A parameter or buffer of a part of a layer, or None, as it is now."""
    # nn.Module.__getattr__ costs more than the rest of a look; it stays for weights that are plain attributes (FSDP's
    # views, replicas of DataParallel).
    parameters = module._parameters
    return parameters[name] if name in parameters else getattr(module, name)


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def only_aligns(module: nn.Module, cls: type) -> bool:
    """Whether the forward on this instance moves the input to the weights and then runs the class's: accelerate's
    ``device_map``. A plan asks for both on one device, so nothing moves, unless the weights are elsewhere between calls."""
    own = module.__dict__
    hook, forward = own.get("_hf_hook"), own["forward"]
    return (
        type(hook).__name__ == "AlignDevicesHook"
        and not hook.offload
        and getattr(getattr(forward, "func", None), "__module__", "") == type(hook).__module__ == "accelerate.hooks"
        and getattr(own.get("_old_forward"), "__func__", None) is cls.forward
    )


class Record:
    """What the looks at one layer have in common.

    Attributes:
        slots: of each tensor that was read the fields that it goes into, its name, itself, and whether it was asked for as
            frozen. holding: id of a tensor of a library's class -> what was read of it.
            transposed: id of a transposed view -> the tensor that was read.
        whole: False once something was read that a pattern cannot tell.
    """

    __slots__ = ("holding", "read", "slots", "trains", "transposed", "whole")

    def __init__(self, read: Callable[[nn.Module, str], Any], trains: Callable[[nn.Module, str, Tensor], bool]):
        self.read, self.trains = read, trains
        self.slots: list[tuple[dict[str, Pattern], str, Tensor | None, bool]] = []
        self.holding: dict[int, dict[str, Pattern]] = {}
        self.transposed: dict[int, Tensor] = {}
        self.whole = True

    def finish(self) -> None:
        """Add the tensors of now to the patterns: their types and dtypes. Another device or a shape that does not fit is
        refused by the op itself."""
        for index, (fields, name, t, frozen) in enumerate(self.slots):
            facts = {} if t is None else {"dtype": same(t.dtype)}
            if frozen and t is not None:
                facts["requires_grad"] = same(t.requires_grad)
            fields[name] = keep(
                index, same(None) if t is None else instance(type(t), self.holding.get(id(t), {}), facts)
            )


class Look:
    """A module of a layer, the layer itself, or what else it holds. ``pattern``: what was read of it so far."""

    __slots__ = ("_own", "_parts", "fields", "module", "pattern", "record")

    def __init__(self, module: nn.Module, record: Record):
        self.module, self.record = module, record
        self._own = module.__dict__
        self._parts: dict[str, Look] = {}
        self.fields = fields = {}
        self.pattern: Pattern = ("object", type(module), fields, {})

    def _inside(self, name: str) -> dict[str, Pattern]:
        pattern = self.fields.get(name)
        if pattern is None:
            pattern = self.fields[name] = items({})
        return pattern[1]

    def value(self, name: str, default: Any = None) -> Any:
        """An attribute of the instance, a plain value or a list of them, or ``default``."""
        if name in self._own:
            value = self._own[name]
            self.fields[name] = equal(value)
            return value
        self.fields[name] = ABSENT
        return default

    def item(self, name: str, key: str, default: Any = None) -> Any:
        """An item of a dict that the instance has, a plain value or a tensor, or ``default``."""
        of, seen = self._own[name], self._inside(name)
        if key not in of:
            seen[key] = ABSENT
            return default
        value = of[key]
        if type(value) in PLAIN_TENSORS:
            self.record.slots.append((seen, key, value, False))
        elif isinstance(value, Tensor):
            self.record.whole = False
        else:
            seen[key] = equal(value)
        return value

    def live(self) -> nn.Module:
        """The module itself, to be read in ways that a pattern cannot tell: nothing of this look is kept."""
        self.record.whole = False
        return self.module

    def parameter(self, name: str) -> Look:
        """A frozen parameter of a library's own class, to be read further: ``module`` of the look is itself."""
        t, own = self.record.read(self.module, name), self._own["_parameters"]
        look = Look(t, self.record)
        if own.get(name) is t:
            self.record.slots.append((self._inside("_parameters"), name, t, True))
            self.record.holding[id(t)] = look.fields
        else:
            self.record.whole = False
        return look

    def member(self, name: str) -> Any:
        """A tensor, or None, among the attributes of the instance."""
        t = self._own.get(name)
        if t is None and name not in self._own:
            self.fields[name] = ABSENT
        elif t is None or type(t) in PLAIN_TENSORS:
            self.record.slots.append((self.fields, name, t, False))
        else:
            self.record.whole = False
        return t

    def part(self, name: str) -> Look | None:
        """A module of this one by its name, or None."""
        look = self._parts.get(name)
        if look is None:
            modules, seen = self._own["_modules"], self._inside("_modules")
            module = modules.get(name)
            if module is not None:
                look = self._parts[name] = Look(module, self.record)
                seen[name] = look.pattern
            else:
                seen[name] = same(None) if name in modules else ABSENT
        return look

    def linked(self, name: str) -> Look:
        """A module that the instance refers to, and that belongs to another; or any object among its attributes."""
        look = self._parts.get(name)
        if look is None:
            look = self._parts[name] = Look(self._own[name], self.record)
            self.fields[name] = look.pattern
        return look

    def require(self, cls: type, name: str) -> None:
        """Refuse this part unless calling it would run its class's forward and nothing else."""
        if type(self.module) is not cls:
            raise NotCovered(f"{name} is a {_name(type(self.module))}")
        own = self._own
        if own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
            raise NotCovered(f"{name} carries a hook")
        self.fields.update(_NO_HOOKS)
        if not self.runs_forward(cls):
            raise NotCovered(f"the forward of {name} was replaced on the instance")

    def runs_forward(self, cls: type) -> bool:
        """Whether calling this part runs the forward of its class."""
        if "forward" not in self._own:
            self.fields["forward"] = ABSENT
            return True
        self.record.whole = False
        return only_aligns(self.module, cls)

    def class_stays(self) -> None:
        """Make the forward that its class has now part of the look: calling this part would run it."""
        cls = type(self.module)
        self.pattern[3]["__class__"] = instance(type(cls), {}, {"forward": same(cls.forward)})

    def tensor(self, name: str, *, frozen: bool = False) -> Any:
        """A parameter or buffer of this part, or None. ``frozen``: whether it requires a gradient is part of the look."""
        record = self.record
        t = record.read(self.module, name)
        held_by = "_buffers" if name in self._own["_buffers"] else "_parameters"
        own = self._own[held_by]
        if name in own and own[name] is t and (t is None or type(t) in PLAIN_TENSORS):
            record.slots.append((self._inside(held_by), name, t, frozen))
        else:
            record.whole = False
        return t

    def holds(self, name: str) -> bool:
        """Whether this part, a dict of modules or of tensors, has an entry of this name."""
        if self.part(name) is not None:
            return True
        kinds = ("_parameters", "_buffers")
        if any(name in self._own[kind] for kind in kinds):
            return True
        for kind in kinds:
            self._inside(kind)[name] = ABSENT
        return False

    def without_gradient(self, name: str, t: Tensor) -> Tensor:
        """This tensor without the gradient that FSDP1's views ask for even if the parameter is frozen."""
        return t.detach() if t.requires_grad and not self.record.trains(self.module, name, t) else t

    def transposed(self, t: Tensor) -> Tensor:
        """The transposed view of a tensor that was read, for the plan."""
        view = t.t()
        self.record.transposed[id(view)] = t
        return view
