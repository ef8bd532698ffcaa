"""What backward keeps of a layer's input, and what it reads again of all that was kept.

Kept is the input itself, shared by the layers that read it: no memory of its own. A copy takes its place where the
input would cost more (a small part of a large storage, a wider dtype than what autocast made of it) or cannot be kept (an
inference tensor), and where ``PEFTKERN_SAVE_INPUT=copy`` asks for it. Who changes the input in place afterwards is known
only then, and a copy for all who might would double what a layer saves: so backward says who did, and what helps.
"""

from __future__ import annotations

import functools
import gc
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.utils.weak import TensorWeakRef

from ..settings import Settings, current

# Whether a node's saved tensors can be read one by one: not in torch 2.11, where an error cannot say which one has changed,
# and none is read without the others.
READS_ONE_BY_ONE = hasattr(torch._C._autograd.SavedTensor, "unpack")
# Of the last input that was copied: itself, its version, dtype and stream, the copy. Layers with one input (q, k, v) share it.
_last: tuple[weakref.ref, tuple, TensorWeakRef] | None = None


def first_only(op: str) -> Callable:
    """A decorator of the ``backward`` of ``op``: RuntimeError where a second derivative is asked for.

    torch's ``once_differentiable`` lets those through whose gradient of the output requires none: as zeros.
    """

    def decorated(backward: Callable) -> Callable:
        @functools.wraps(backward)
        def first(ctx, *grads):
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                raise RuntimeError(f"{op} has no second derivative: call backward without create_graph=True")
            return backward(ctx, *grads)

        return first

    return decorated


def _must_copy(x: Tensor, now: Settings | None) -> bool:
    if x.untyped_storage().nbytes() > 2 * x.numel() * x.element_size() or x.is_inference():
        return True
    return (now or current()).save_input == "copy"


def kept_input(x: Tensor, given: Tensor, now: Settings | None) -> Tensor:
    """What stands for x in backward. ``given``: x as the op gets it, cast by autocast or not. ``now``: the settings of
    the call, None if it has not asked for them."""
    global _last
    narrower = given.dtype is not x.dtype and given.dtype.itemsize < x.dtype.itemsize
    if not narrower and not _must_copy(x, now):
        return x
    state = None
    if not x.is_inference():  # nobody counts the changes of those
        stream = torch._C._cuda_getCurrentRawStream(x.device.index) if x.is_cuda else None
        state = x._version, given.dtype, stream
        last = _last
        copy = last[2]() if last is not None and last[0]() is x and last[1] == state else None
        if copy is not None:
            return copy
    if torch._C._is_alias_of(given, x):
        given = given.clone(memory_format=torch.contiguous_format)
    if state is not None:
        _last = weakref.ref(x), state, TensorWeakRef(given)
    return given


def read_saved(
    ctx, op: str, names: Callable[[], Sequence[str]], readers: Callable[[tuple], Sequence]
) -> tuple[tuple, tuple]:
    """(saved tensors, the gradients that are needed) of a node in backward.

    Args:
        ctx: the node. op: its public name. names: of what it saved, for messages; more of them are called by the last.
        readers: for the needed gradients, which of the saved tensors some of them read.

    If a tensor was changed in place since, then only what ``backward(inputs=...)`` asks for counts as needed, as it does in
    a graph of smaller nodes; RuntimeError names the layer, the tensor and the remedy if that reads a changed tensor.
    """
    needs = ctx.needs_input_grad
    if torch.compiler.is_compiling():
        return ctx.saved_tensors, needs
    try:
        return ctx.saved_tensors, needs
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        if not READS_ONE_BY_ONE:
            name = f"{names()[0]} or a parameter"
            raise RuntimeError(f"{_changed(ctx, op, name, True)} ({error})") from error
    edges = (node for node, _ in ctx.next_functions if node is not None)
    needs = tuple(need and _runs(next(edges)) for need in needs)
    saved = []
    for i, (packed, read) in enumerate(zip(ctx._raw_saved_tensors, readers(needs), strict=True)):
        try:
            saved.append(packed.unpack() if read else None)
        except RuntimeError as error:
            known = names()
            name = known[min(i, len(known) - 1)]
            raise RuntimeError(f"{_changed(ctx, op, name, name[0] == known[0])} ({error})") from error
    return tuple(saved), needs


def _runs(node) -> bool:
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # of a leaf in autograd.grad, which asks for no other
        return True


def _changed(ctx, op: str, name: str, is_input: bool) -> str:
    text = f"{op}: {name} was changed in place after the forward pass{_layer(ctx)}, and a gradient needs it as it was."
    if is_input:
        text += (
            " Change a copy (h = h + y, not h += y), or set PEFTKERN_SAVE_INPUT=copy in the environment to keep one."
        )
    return text


def _parameters(ctx) -> Iterator[Tensor]:
    # Of the layer: what is above its first edges, the inputs, belongs to others.
    nodes = deque(ctx.next_functions[getattr(ctx, "inputs", 1) :])
    for _ in range(256):
        if not nodes:
            return
        node, _ = nodes.popleft()
        if hasattr(node, "variable"):
            yield node.variable
        elif node is not None:
            nodes.extend(node.next_functions)


def _layer(ctx) -> str:
    # By its longest name in the modules alive. It costs a call nothing: only errors look for it.
    parameters = {id(p) for p in _parameters(ctx)}
    modules = [o for o in gc.get_objects() if issubclass(type(o), nn.Module) and "_modules" in o.__dict__]
    children = {id(child) for m in modules for child in m._modules.values()}
    names = [
        name
        for root in modules
        if id(root) not in children
        for name, parameter in root.named_parameters()
        if id(parameter) in parameters
    ]
    return f" of the layer that has {max(names, key=len)!r}" if names else ""
