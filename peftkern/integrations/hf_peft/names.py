"""How the layers of a model get the ``adapter_names`` of a call: by hooks, for as long as the call runs.

PEFT has contexts with such hooks for some tuners, which know LoRA's layers, refuse training and give the names to every thread
that calls the model meanwhile. Ours take their place where all layers are accelerated, and serve any other tuner, for which PEFT
drops the names or trips over them. PEFT's stay in charge of models of LoRA that are accelerated in part, and of aLoRA's offsets.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.compiler import is_compiling

from ...methods.registry import method_of, variant_of
from .mixed import BASE

Wanted = Callable[[nn.Module], bool]  # whether a layer is accelerated
CONTEXT = "_enable_peft_forward_hooks"  # PEFT's name of the contexts
_REFUSED = "Cannot pass `adapter_names`"


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """The layers with adapters of a model by their names, without what the wrappers of saved modules are made of."""
    inside = {m for part in model.modules() if isinstance(part, AuxiliaryTrainingWrapper) for m in part.modules()}
    return {name: m for name, m in model.named_modules() if isinstance(m, BaseTunerLayer) and m not in inside}


def any_wanted(model: nn.Module, wanted: Wanted) -> bool:
    """Whether some layer of this model is accelerated."""
    return any(isinstance(m, BaseTunerLayer) and method_of(type(m)) and wanted(m) for m in model.modules())


def _takes(module: nn.Module) -> bool:
    # Whether the forward of this module may be given names.
    if isinstance(module, BaseTunerLayer):
        return isinstance(module, LoraLayer) or method_of(type(module)) is not None
    return isinstance(module, AuxiliaryTrainingWrapper)


def _takers(model: nn.Module) -> list[nn.Module]:
    # Those that get names by hooks. A layer inside another gets them from that one, which takes the place of both.
    found = [m for m in model.modules() if _takes(m)]
    inside = {m._modules.get("base_layer") for m in found}
    return [m for m in found if m not in inside]


def _reason(model: nn.Module, names: Sequence[str], wanted: Wanted) -> str | None:
    # Why layers of this model cannot take these names by themselves, or None.
    adapters = set(names) - {BASE}
    for name, layer in layers_of(model).items():
        method = method_of(type(layer))
        if method is None or method.of is not None:
            if isinstance(layer, LoraLayer):
                continue  # of an embedding or a convolution: PEFT's own code takes names
            return f"{name} is a {type(layer).__module__}.{type(layer).__qualname__}, which knows no such batches"
        if not wanted(layer):
            return f"{name} is not accelerated"
        if not method.mixed:
            return f"{name} is a layer of {method.name}, which knows no such batches"
        for adapter, variant in getattr(layer, "lora_variant", {}).items():
            method = variant_of(type(variant))
            if adapter in adapters and (method is None or not method.mixed):
                return f"adapter {adapter!r} of {name} is a LoRA variant ({type(variant).__name__})"
    return None


def _give(module, args, kwargs, *, names, part, thread):
    # The hooks of calls in several threads lie on one module; what replicates a model runs the replicas in threads of its own.
    if module is not part or is_compiling() or threading.get_ident() == thread:
        kwargs["adapter_names"] = names
    return args, kwargs


def _names_for(part: nn.Module, names: Sequence[str]) -> Sequence[str]:
    # A wrapper of saved modules knows the adapters that saved one; for all others the module is the base model's.
    if not isinstance(part, AuxiliaryTrainingWrapper):
        return names
    held = vars(part)["_adapters"]
    return [name if name in held else BASE for name in names]


@contextlib.contextmanager
def _given(parts: Sequence[tuple[nn.Module, Sequence[str]]]) -> Iterator[None]:
    handles = []
    try:
        for part, names in parts:
            names = _names_for(part, names)
            give = functools.partial(_give, names=names, part=part, thread=threading.get_ident())
            handles.append(part.register_forward_pre_hook(give, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _own(tuner: BaseTuner, names: Sequence[str], num_beams: Any = None) -> contextlib.AbstractContextManager:
    # The context of a model whose layers all take names.
    if not isinstance(names, (list, tuple)):
        raise TypeError(f"Got adapter names of type {type(names)}, expected a list of str.")
    unknown = set(names) - {BASE} - tuner.peft_config.keys()
    if unknown:
        raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(sorted(map(str, unknown)))}")
    repeated, before = names, set()
    if isinstance(num_beams, int) and num_beams > 1:
        # Beams stand side by side, but an encoder runs before there are any.
        repeated = [name for name in names for _ in range(num_beams)]
        encoder = tuner.model.get_encoder() if hasattr(tuner.model, "get_encoder") else None
        before = set() if encoder is None or encoder is tuner.model else set(encoder.modules())
    return _given([(part, names if part in before else repeated) for part in _takers(tuner)])


def _checkpoint_with_names(checkpoint, parts, function, *args, **kwargs):
    # Runs in forward and again in backward, when the hooks of the call are long gone: so it brings hooks of its own.
    def with_names(*inputs, **options):
        with _given(parts):
            return function(*inputs, **options)

    return checkpoint(with_names, *args, **kwargs)


@contextlib.contextmanager
def _checkpoints_keep(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    changed = []
    for module in model.modules():
        checkpoint = module.__dict__.get("_gradient_checkpointing_func")
        if checkpoint is not None and getattr(module, "gradient_checkpointing", False):
            parts = [(part, names) for part in _takers(module)]
            module._gradient_checkpointing_func = functools.partial(_checkpoint_with_names, checkpoint, parts)
            changed.append((module, checkpoint))
    try:
        yield
    finally:
        for module, checkpoint in changed:
            module._gradient_checkpointing_func = checkpoint


@contextlib.contextmanager
def _left_as_after_success(context) -> Iterator[None]:
    # Left as PEFT leaves its context, it keeps the hooks of a forward that raised, and they give the names of that batch to
    # later ones.
    context.__enter__()
    try:
        yield
    finally:
        context.__exit__(None, None, None)


@contextlib.contextmanager
def _in_training(tuner: BaseTuner, enter: Callable[[], Any], names: Sequence[str]) -> Iterator[None]:
    # PEFT's checks and hooks are right in training too; the flag of the outermost module is all that they object to.
    with contextlib.ExitStack() as stack:
        tuner.training = False
        try:
            stack.enter_context(enter())
        finally:
            tuner.training = True
        stack.enter_context(_checkpoints_keep(tuner, names))
        yield


def context_of(stock: Callable | None, wanted: Wanted, trained: Callable[[nn.Module], None]) -> Callable:
    """The context manager that takes the place of a tuner class's own, ``stock``, None for a class without.

    ``trained``: told each layer of a model that a batch with names trains.
    """

    @contextlib.contextmanager
    def hooks(self, *args, **kwargs):
        names = kwargs.get("adapter_names")
        rest = {k: v for k, v in kwargs.items() if k != "adapter_names"}
        if names is None or not any_wanted(self, wanted):
            # What a class without finds is that of a model inside.
            found = getattr(self.model, CONTEXT, None) if stock is None else functools.partial(stock, self)
            with contextlib.nullcontext() if found is None else found(*args, **kwargs):
                yield
            return

        activated = rest.get("alora_offsets") is not None
        training = self.training and not activated
        reason = None if activated else _reason(self, names, wanted)
        ours = stock is None or not (activated or reason)

        def enter():
            if ours:
                return _own(self, names, rest.get("num_beams"))
            return _left_as_after_success(stock(self, *args, adapter_names=names, **rest))

        if reason is not None and (training or stock is None):
            when = " when the model is in training mode" if training else ""
            raise ValueError(f"{_REFUSED}{when}: {reason}")
        if training:
            for layer in layers_of(self).values():
                trained(layer)
        with _in_training(self, enter, names) if training else enter():
            yield

    return hooks if stock is None else functools.wraps(stock)(hooks)


def call_of(stock: Callable, wanted: Wanted) -> Callable:
    """What takes the place of ``forward`` or ``generate`` of a model of several tuners, ``stock``: PEFT's enters no context."""

    @functools.wraps(stock)
    def call(self, *args, adapter_names=None, **kwargs):
        if adapter_names is None:
            return stock(self, *args, **kwargs)
        if not any_wanted(self, wanted):
            return stock(self, *args, adapter_names=adapter_names, **kwargs)
        with getattr(self.base_model, CONTEXT)(*args, adapter_names=adapter_names, **kwargs):
            return stock(self, *args, **kwargs)

    return call
