"""What a layer of AdapterHub's bottleneck adapters does with several of them.

``BatchSplit`` and ``Parallel`` give each adapter some of the sequences. The library cuts every tensor of the layer's state for
each adapter and puts all of them together again, which costs more than the adapters do, most of all in backward. Here its code
goes on with ``Part``s, which say whose sequences are whose, and nothing is cut before all of them are known: then

    hidden_states = residual + the branch of each sequence's adapter        by one ``multi_bottleneck_adapter``

where that expresses all of them and is faster, else each adapter runs on its sequences of the two tensors that it reads.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from adapters.composition import AdapterCompositionBlock, BatchSplit, Parallel, Stack
from adapters.context import ForwardContext
from adapters.methods.bottleneck import BottleneckLayer, BottleneckState
from adapters.methods.modeling import Adapter, ParallelAdapter
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from ...autograd.residual.multi_bottleneck_adapter import Bottleneck, multi_bottleneck_adapter
from ...dispatch.least import BOTTLENECK, least_work
from ...methods.look import NotCovered
from ...settings import current
from ..status import calls_of
from .bottleneck import around, check, taken
from .forward import plan_of, switch, too_small


class Part(NamedTuple):
    """Sequences of a state, and then the name of their adapter."""

    whole: BottleneckState
    rows: slice
    adapter: str = ""

    @property
    def count(self) -> int:
        return self.rows.stop - self.rows.start


def _is_ours(cls: type, owner: type, name: str) -> bool:
    # Neither a subclass nor another library has put something in its place.
    return getattr(cls, name) is switch.replaced.get((owner, name), (None, None))[1]


def _parts(layer: BottleneckLayer, setup: AdapterCompositionBlock, state: BottleneckState) -> bool:
    # Whether the library's code may make Parts of this state: each is all that an adapter gets, and its output all that is read.
    if around.fuses or state.input_tensor is None:
        return False
    if not is_dynamo_compiling() and too_small(least_work(BOTTLENECK, current()), state.hidden_states):
        return False
    if not all(isinstance(child, str) and child in layer.adapters for child in setup):
        return False
    sizes = setup.batch_sizes if type(setup) is BatchSplit else ()
    if sizes and (len(sizes) != len(setup) or min(sizes) < 0):
        return False  # the library leaves sequences out
    held = [layer.adapters[child] for child in setup]
    return all(
        type(each) in (Adapter, ParallelAdapter) and switch.wanted(each) and _is_ours(type(each), type(each), "forward")
        for each in held
    ) and all(_is_ours(type(layer), owner, name) for owner, name in COMPOSITION if owner is BottleneckLayer)


def _compose(name: str, own: Callable | None) -> Callable:
    stock = getattr(BottleneckLayer, name) if own is None else own  # it has that of its parent

    @functools.wraps(stock)
    def compose(self, adapter_setup, state, lvl=0):
        before, around.parts = around.parts, _parts(self, adapter_setup, state)
        try:
            return stock(self, adapter_setup, state, lvl)
        finally:
            around.parts = before

    return compose


def _vslice(stock):
    @functools.wraps(stock)
    def vslice(self, state, slice_obj):
        return Part(state, slice_obj) if around.parts else stock(self, state, slice_obj)

    return vslice


def _compose_single(stock):
    @functools.wraps(stock)
    def compose_single(self, adapter_setup, state, lvl=0):
        if type(state) is Part:
            return state._replace(adapter=adapter_setup)
        return stock(self, adapter_setup, state, lvl)

    return compose_single


def _pad_and_concat(stock):
    @functools.wraps(stock)
    def pad_and_concat(self, states):
        if type(states[0]) is not Part:
            # Of a batch that several adapters share, some fused: nobody reads what they add.
            if any(state.bottleneck_up is None for state in states):
                states = [state._replace(bottleneck_up=None) for state in states]
            return stock(self, states)
        try:
            hidden_states = _together(self, states)
        except NotCovered:  # what speaks against an adapter alone is said by its own call
            hidden_states = _apart(self, states)
        whole, _, last = states[-1]
        return whole._replace(hidden_states=hidden_states, bottleneck_up=None, last=last)

    return pad_and_concat


def _together(layer: BottleneckLayer, parts: list[Part]) -> Tensor:
    """What all adapters make of all sequences. Raises NotCovered where one call does not express that, or is slower."""
    whole = parts[0].whole
    x, residual = whole.hidden_states, whole.adapter_residual
    if not x.is_cpu:
        raise NotCovered("on other devices the op of one adapter has kernels of its own")
    context = ForwardContext.get_context()
    if context is not None and context.output_adapter_gating_scores:
        raise NotCovered("gating scores are told")
    modules = {part.adapter: layer.adapters[part.adapter] for part in parts}
    kinds = {type(module) for module in modules.values()}
    if len(kinds) != 1:
        raise NotCovered("some are added to their input and others beside it")
    beside = kinds == {ParallelAdapter}
    if beside:
        residual = around.beside
    if residual is None:
        raise NotCovered("what they are added to comes later")
    bottlenecks = [_listed(module, x, residual) for module in modules.values()]
    slot = {name: i for i, name in enumerate(modules)}
    ids = (_ids.__wrapped__ if is_dynamo_compiling() else _ids)(
        tuple((slot[part.adapter], part.count) for part in parts)
    )
    y = multi_bottleneck_adapter(taken(x, residual), bottlenecks, ids, residual=residual)
    if beside:
        around.added = True
    for part in () if is_dynamo_compiling() else parts:
        calls_of(modules[part.adapter]).fused += 1
    return y


def _listed(module: nn.Module, x: Tensor, residual: Tensor) -> Bottleneck:
    """What an adapter adds. Raises NotCovered."""
    plan = plan_of(module)
    check(plan, x, residual)
    if any(each is not None for each in (plan.norm_before, plan.norm_after, plan.gate, plan.drops_rows)):
        raise NotCovered("it has a norm, a gate or dropped rows")
    if plan.dropout_p:
        raise NotCovered("it drops what it adds, not its input")
    scaling, out_scale = plan.scales
    return Bottleneck(
        plan.down.weight(), plan.up.weight(), plan.down.bias, plan.up.bias, plan.activation, scaling, out_scale
    )


@functools.lru_cache(maxsize=64)  # by which all layers share the route of a batch
def _ids(runs: tuple[tuple[int, int], ...]) -> Tensor:
    # Of (slot, sequences) the slot of each sequence.
    with torch.inference_mode(False):
        return torch.tensor([slot for slot, count in runs for _ in range(count)], dtype=torch.int64)


def _apart(layer: BottleneckLayer, parts: list[Part]) -> Tensor:
    """The same by a call of each adapter, which says itself how it runs."""
    whole, outputs, beside = parts[0].whole, [], around.beside
    tensors = (t.split([part.count for part in parts]) for t in (whole.hidden_states, whole.adapter_residual))
    around.beside = None  # of all sequences
    try:
        for part, x, residual in zip(parts, *tensors):
            state = whole._replace(hidden_states=x, adapter_residual=residual)
            outputs.append(layer.compose_single(part.adapter, state).hidden_states)
    finally:
        around.beside = beside
    return torch.cat(outputs)


def _compose_fuse(stock):
    @functools.wraps(stock)
    def compose_fuse(self, *args, **kwargs):
        before, around.fuses = around.fuses, True
        try:
            return stock(self, *args, **kwargs)
        finally:
            around.fuses = before

    return compose_fuse


def _adds_beside(layer: BottleneckLayer) -> bool:
    # Whether all that acts in this layer is added to its input at the end: each sequence takes one parallel adapter.
    setup = layer.get_active_setup()
    if type(setup) not in (Stack, BatchSplit, Parallel) or not all(isinstance(child, str) for child in setup):
        return False
    held = [layer.adapters[child] for child in setup if child in layer.adapters]
    return all(type(each) is ParallelAdapter for each in held) and (type(setup) is not Stack or len(held) == 1)


def _layer_forward(stock):
    @functools.wraps(stock)
    def bottleneck_layer_forward(self, hidden_states, residual_input, layer_norm):
        if not _adds_beside(self):
            return stock(self, hidden_states, residual_input, layer_norm)
        around.beside = hidden_states
        try:
            return stock(self, hidden_states, residual_input, layer_norm)
        finally:
            around.beside, around.added = None, False

    return bottleneck_layer_forward


def _post_forward(stock):
    @functools.wraps(stock)
    def post_forward(self, hidden_states, input_hidden_states, input_tensor, layer_norm):
        if not around.added:
            return stock(self, hidden_states, input_hidden_states, input_tensor, layer_norm)
        return Adapter.post_forward(self, hidden_states, input_hidden_states, input_tensor, layer_norm)

    return post_forward


# (class, name) of what is replaced while modules are accelerated -> what makes ours of the library's own.
COMPOSITION: Mapping[tuple[type, str], Callable[[Callable], Callable]] = {
    (BottleneckLayer, "compose_batch_split"): functools.partial(_compose, "compose_batch_split"),
    (BottleneckLayer, "compose_parallel"): functools.partial(_compose, "compose_parallel"),
    (BottleneckLayer, "vslice"): _vslice,
    (BottleneckLayer, "compose_single"): _compose_single,
    (BottleneckLayer, "pad_and_concat"): _pad_and_concat,
    (BottleneckLayer, "compose_fuse"): _compose_fuse,
    (BottleneckLayer, "bottleneck_layer_forward"): _layer_forward,
    (ParallelAdapter, "post_forward"): _post_forward,
}
