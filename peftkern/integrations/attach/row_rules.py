"""How an operation carries the place of the batch from its inputs to its outputs, one rule per kind of operation.

The place names an axis and how many of its indices in a row belong to one sequence:

    index j of axis  ->  sequence (j // inner) % batch

A rule follows positions, not values: what row b of an attention output was computed from does not matter, that it is
row b of the query does. Where an operand of known place meets one of unknown place, position by position, the known one
stands (a residual stream goes on behind a block that could not be followed).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import prod
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """Where the batch lies in a tensor: see above. The axis has a multiple of batch * inner indices."""

    axis: int
    inner: int = 1


class Unknown:
    """The place of a tensor that was made from sequences, nobody can say how."""

    def __repr__(self) -> str:
        return "UNKNOWN"


UNKNOWN: Final = Unknown()
Place = Rows | Unknown | None  # None: of no sequence (weights, constants, positions)


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors of an argument or a result: itself, or a list's."""
    return [t for t in (value if isinstance(value, (list, tuple)) else (value,)) if isinstance(t, Tensor)]


class Call(NamedTuple):
    """One operation: arguments by their names in its schema, its result, the place of a tensor, whether it comes from
    torch.arange, the batch."""

    arguments: dict[str, Any]
    out: Any
    place: Callable[[Tensor], Place]
    counted: Callable[[Tensor], bool]
    batch: int

    @property
    def tensors(self) -> list[Tensor]:
        return [t for value in self.arguments.values() for t in tensors_of(value)]

    @property
    def first(self) -> Tensor:
        return self.tensors[0]

    @property
    def shape(self) -> torch.Size:
        return (self.out if isinstance(self.out, Tensor) else self.out[0]).shape


Rule = Callable[[Call], Place]


def nothing_known(call: Call) -> Place:
    """The rule of an operation without one: unknown if anything of a sequence went in."""
    return UNKNOWN if any(call.place(t) is not None for t in call.tensors) else None


def _agreed(places: Iterable[Place], otherwise: Place) -> Place:
    known = {p for p in places if isinstance(p, Rows)}
    return known.pop() if len(known) == 1 else UNKNOWN if known else otherwise


def pointwise(call: Call) -> Place:
    """Elementwise, with broadcasting from the right."""
    places, unknown, full = [], False, False
    for t in call.tensors:
        place = call.place(t)
        if isinstance(place, Rows):
            axis = place.axis + len(call.shape) - t.dim()
            places.append(Rows(axis, place.inner) if t.shape[place.axis] == call.shape[axis] else UNKNOWN)
            full |= t.shape == call.shape
        unknown |= place is UNKNOWN
    if (unknown and not full) or UNKNOWN in places:
        return UNKNOWN
    return _agreed(places, UNKNOWN if unknown else None)


def same_order(call: Call) -> Place:
    """Another shape over the same elements in the same order (view, squeeze, unflatten)."""
    place, shape = call.place(call.first), call.shape
    if not isinstance(place, Rows) or "dtype" in call.arguments:  # elements of another size: only the last axis differs
        return place
    run = place.inner * prod(call.first.shape[place.axis + 1 :])  # elements in a row of one sequence
    for axis in range(len(shape) - 1, -1, -1):
        after = prod(shape[axis + 1 :])
        inner, rest = divmod(run, after) if after else (0, 0)
        if inner and not rest and shape[axis] >= call.batch and shape[axis] % (inner * call.batch) == 0:
            return Rows(axis, inner)
    return UNKNOWN


def _axes(t: Tensor, dims: Any) -> set[int]:
    if dims is None or dims == []:
        return set(range(t.dim()))
    return {d % max(t.dim(), 1) for d in (dims if isinstance(dims, (list, tuple)) else [dims])}


def _dims(call: Call) -> set[int]:
    arguments = call.arguments
    return _axes(call.first, arguments.get("dim", arguments.get("dims", arguments.get("dimension"))))


def along(call: Call) -> Place:
    """Along dimensions that stay (softmax, cumsum, sort), or with others behind them (unfold)."""
    place = call.place(call.first)
    return UNKNOWN if isinstance(place, Rows) and place.axis in _dims(call) else place


def reduction(call: Call) -> Place:
    """Over dimensions that go, or stay with one index (sum, mean, amax)."""
    place = call.place(call.first)
    if not isinstance(place, Rows):
        return place
    dims = _dims(call)
    if place.axis in dims:
        return UNKNOWN
    gone = 0 if call.arguments.get("keepdim") else sum(d < place.axis for d in dims)
    return Rows(place.axis - gone, place.inner)


def first_axis(call: Call) -> Place:
    """Each index of the first axis by itself (convolution, pooling, attention)."""
    place = call.place(call.first)
    if isinstance(place, Rows) and (place.axis or call.shape[0] != call.first.shape[0]):
        return UNKNOWN
    return place


def attended(call: Call) -> Place:
    """Attention with the batch as first axis of query, key and value; queries may be the model's own."""
    names = [n for n in ("query", "key", "value") if isinstance(call.arguments.get(n), Tensor)]
    places = [call.place(call.arguments[n]) for n in names]
    if places[0] is None and _agreed(places, None) == Rows(0):
        return Rows(0) if call.shape[0] == call.arguments["key"].shape[0] else UNKNOWN
    return first_axis(call)


def normalised(call: Call) -> Place:
    """A norm over the last dimensions."""
    place = call.place(call.first)
    last = len(call.arguments.get("normalized_shape") or (0,))
    return UNKNOWN if isinstance(place, Rows) and place.axis >= call.first.dim() - last else place


def as_given(call: Call) -> Place:
    """The first tensor's axes stay as they are (triu, one_hot, view_as_real)."""
    return call.place(call.first)


def product(call: Call) -> Place:
    """A matrix product: its two operands come last among the tensors."""
    left, right = (call.arguments[n] for n in (("mat1", "mat2") if "mat1" in call.arguments else ("self", "mat2")))
    return _product(call, left, right)


def batched_product(call: Call) -> Place:
    """bmm and baddbmm."""
    left = call.arguments.get("batch1", call.arguments["self"])
    return _product(call, left, call.arguments.get("batch2", call.arguments.get("mat2")))


def _product(call: Call, left: Tensor, right: Tensor) -> Place:
    a, b = call.place(left), call.place(right)
    places = []
    if isinstance(a, Rows):
        places.append(UNKNOWN if a.axis == left.dim() - 1 else a)
    if isinstance(b, Rows):
        places.append(UNKNOWN if b.axis == right.dim() - 2 else b)
    if UNKNOWN in places:
        return UNKNOWN
    return _agreed(places, UNKNOWN if UNKNOWN in (a, b) else None)


def linear(call: Call) -> Place:
    """F.linear as one operation."""
    x = call.arguments["input"]
    place = call.place(x)
    return UNKNOWN if isinstance(place, Rows) and place.axis == x.dim() - 1 else place


def quantised_linear(call: Call) -> Place:
    """A layer of a library that quantises, and codes of its input: x comes first, the weight's parts have no place."""
    place, x = call.place(call.first), call.first
    if not isinstance(place, Rows) or place.axis == x.dim() - 1 or call.shape[:-1] != x.shape[:-1]:
        return nothing_known(call)
    return place


def permuted(call: Call) -> Place:
    """permute, transpose, t."""
    place, n = call.place(call.first), call.first.dim()
    if not isinstance(place, Rows):
        return place
    order = list(range(n))
    if "dims" in call.arguments:
        order = [d % n for d in call.arguments["dims"]]
    elif n > 1:
        i, j = (call.arguments.get(d, default) % n for d, default in (("dim0", 0), ("dim1", 1)))
        order[i], order[j] = j, i
    return Rows(order.index(place.axis), place.inner)


def expanded(call: Call) -> Place:
    """expand and repeat: new axes come first; a repeated batch goes round once more."""
    place = call.place(call.first)
    return Rows(place.axis + len(call.shape) - call.first.dim(), place.inner) if isinstance(place, Rows) else place


def padded(call: Call) -> Place:
    """constant_pad_nd: pairs of widths, the last dimension's first."""
    place, pad = call.place(call.first), call.arguments["pad"]
    if not isinstance(place, Rows):
        return place
    pair = 2 * (call.first.dim() - 1 - place.axis)
    return UNKNOWN if any(pad[pair : pair + 2]) else place


def selected(call: Call) -> Place:
    """One index of a dimension (select), or each of them (unbind)."""
    place = call.place(call.first)
    if not isinstance(place, Rows):
        return place
    (dim,) = _axes(call.first, call.arguments.get("dim", 0))
    return UNKNOWN if place.axis == dim else Rows(place.axis - (dim < place.axis), place.inner)


def sliced(call: Call) -> Place:
    """A range of a dimension."""
    place = call.place(call.first)
    (dim,) = _axes(call.first, call.arguments.get("dim", 0))
    if not isinstance(place, Rows) or place.axis != dim:
        return place
    round_ = place.inner * call.batch
    size, start = call.first.shape[dim], call.arguments.get("start") or 0
    start = start + size if start < 0 else start
    whole = call.arguments.get("step", 1) == 1 and start % round_ == 0 and call.shape[dim] % round_ == 0
    return place if whole and call.shape[dim] else UNKNOWN


def split(call: Call) -> Place:
    """Ranges of a dimension, all of which are alike or nothing is known."""
    place = call.place(call.first)
    (dim,) = _axes(call.first, call.arguments.get("dim", 0))
    if not isinstance(place, Rows) or place.axis != dim:
        return place
    return place if all(t.shape[dim] % (place.inner * call.batch) == 0 for t in call.out) else UNKNOWN


def joined(call: Call) -> Place:
    """cat: along the batch's axis every part must go round the batch the same way."""
    parts = [t for t in call.tensors if t.numel()]
    places = [call.place(t) for t in parts]
    place = _agreed(places, UNKNOWN if UNKNOWN in places else None)
    if isinstance(place, Rows) and place.axis in _axes(parts[0], call.arguments.get("dim", 0)):
        return place if all(p == place for p in places) else UNKNOWN
    return place


def stacked(call: Call) -> Place:
    """stack."""
    places = [call.place(t) for t in call.tensors]
    place = _agreed(places, UNKNOWN if UNKNOWN in places else None)
    dim = call.arguments.get("dim", 0) % len(call.shape)
    return Rows(place.axis + (dim <= place.axis), place.inner) if isinstance(place, Rows) else place


def embedded(call: Call) -> Place:
    """embedding: the indices say where."""
    return call.place(call.arguments["indices"])


def _identity(call: Call, index: Tensor, size: int) -> bool:
    # torch.arange(batch), and never a choice made from data: a later call may choose otherwise.
    if index.dim() != 1 or not call.counted(index):
        return False
    return torch.equal(index, torch.arange(size, device=index.device, dtype=index.dtype))


def indexed(call: Call) -> Place:
    """x[i, j]: advanced indices beside the batch's axis, or arange(batch) on it."""
    x, indices = call.first, call.arguments["indices"]
    place = call.place(x)
    taken = [d for d, i in enumerate(indices) if i is not None]
    if place is None and len(taken) == 1 and indices[taken[0]].dtype not in (torch.bool, torch.uint8):
        of_table = call.place(indices[taken[0]])
        return Rows(of_table.axis + taken[0], of_table.inner) if isinstance(of_table, Rows) else of_table
    if not isinstance(place, Rows):
        return nothing_known(call)
    if any(indices[d].dtype in (torch.bool, torch.uint8) for d in taken) or taken != list(
        range(taken[0], taken[-1] + 1)
    ):
        return UNKNOWN
    if place.axis in taken:
        index = indices[place.axis]
        keeps = place.inner == 1 and _identity(call, index, x.shape[place.axis])
        return Rows(taken[0]) if keeps and all(indices[d].dim() <= 1 for d in taken) else UNKNOWN
    if place.axis < taken[0]:
        return place
    return Rows(place.axis + len(call.shape) - x.dim(), place.inner)


def gathered(call: Call) -> Place:
    """index_select and gather along a dimension that is not the batch's."""
    place, index = call.place(call.first), call.arguments["index"]
    if not isinstance(place, Rows):
        return nothing_known(call)
    if place.axis not in _dims(call):
        return place if call.shape[place.axis] == call.first.shape[place.axis] else UNKNOWN
    return place if _identity(call, index, call.first.shape[place.axis]) else UNKNOWN


def written(call: Call) -> Place:
    """Values written into places of the first tensor: it keeps its own, unless whole sequences are replaced."""
    arguments, place = call.arguments, call.place(call.first)
    if not isinstance(place, Rows):
        return nothing_known(call)
    values = next((v for n in ("values", "source", "src") if isinstance(v := arguments.get(n), Tensor)), None)
    given = None if values is None else call.place(values)
    if given is None or arguments.get("accumulate"):
        return place
    if "indices" not in arguments:
        return (
            UNKNOWN if "mask" not in arguments and place.axis in _axes(call.first, arguments.get("dim", 0)) else place
        )
    axes: dict[int, Tensor] = {}
    axis = 0
    for index in arguments["indices"]:
        mask = index is not None and index.dtype in (torch.bool, torch.uint8)
        axes |= {} if index is None else {axis + d: index for d in range(index.dim() if mask else 1)}
        axis += index.dim() if mask else 1
    if place.axis not in axes or (place.inner == 1 and _identity(call, axes[place.axis], call.first.shape[place.axis])):
        return place
    whole = place.inner == 1 and len(axes) == 1
    return (
        UNKNOWN if isinstance(given, Rows) or whole else place
    )  # else items, put where each sequence has room for them


def added(call: Call) -> Place:
    """Values added in places of the first tensor: it keeps its own."""
    place = call.place(call.first)
    return place if isinstance(place, Rows) else nothing_known(call)


def copied(call: Call) -> Place:
    """copy_: all of the first tensor is written, so the source says whose it is now."""
    source = call.arguments["src"]
    given = call.place(source)
    if given is None:
        return call.place(call.first)
    if not isinstance(given, Rows):
        return UNKNOWN
    axis = given.axis + call.first.dim() - source.dim()
    return Rows(axis, given.inner) if source.shape[given.axis] == call.first.shape[axis] else UNKNOWN


def created(call: Call) -> Place:
    """A tensor like another one, with values of its own."""
    return None


def _table() -> dict[str, Rule]:
    kinds = {
        pointwise: "_to_copy detach alias lift lift_fresh clone hardswish _prelu_kernel prelu native_dropout dropout"
        " bernoulli floor_divide divide multiply subtract log_sigmoid_forward __and__ __or__ isin bucketize conj real imag"
        " masked_fill complex polar contiguous to nan_to_num special_ndtr relu6 quantize_per_tensor",
        same_order: "view _unsafe_view reshape _reshape_alias unsqueeze squeeze view_copy _reshape_copy",
        along: "_softmax _log_softmax _safe_softmax cumsum cumprod cummax cummin logcumsumexp sort topk flip roll glu unfold",
        reduction: "sum mean amax amin var std var_mean std_mean prod any all argmax argmin max min median logsumexp"
        " linalg_vector_norm norm nansum count_nonzero",
        first_axis: "convolution _convolution conv2d native_group_norm native_batch_norm _native_batch_norm_legit"
        " _native_batch_norm_legit_no_training _batch_norm_no_update cudnn_batch_norm max_pool2d_with_indices avg_pool2d"
        " _adaptive_avg_pool2d upsample_nearest2d upsample_bilinear2d upsample_bicubic2d upsample_nearest1d"
        " upsample_linear1d reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d im2col pixel_shuffle"
        " pixel_unshuffle _native_multi_head_attention _transformer_encoder_layer_fwd",
        attended: "_scaled_dot_product_flash_attention _scaled_dot_product_flash_attention_for_cpu"
        " _scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention"
        " _scaled_dot_product_fused_attention_overrideable _scaled_dot_product_attention_math"
        " scaled_dot_product_attention",
        normalised: "native_layer_norm layer_norm _fused_rms_norm rms_norm",
        as_given: "triu tril one_hot view_as_real view_as_complex",
        product: "mm addmm",
        batched_product: "bmm baddbmm",
        linear: "linear",
        quantised_linear: "bitsandbytes::gemm_4bit bitsandbytes::gemv_4bit bitsandbytes::int8_vectorwise_quant"
        " bitsandbytes::int8_mixed_scaled_mm bitsandbytes::int8_scaled_mm quanto::qbytes_mm",
        permuted: "permute transpose t",
        expanded: "expand repeat",
        padded: "constant_pad_nd",
        selected: "select unbind",
        sliced: "slice narrow",
        split: "split split_with_sizes unsafe_split unsafe_split_with_sizes chunk unsafe_chunk tensor_split",
        joined: "cat",
        stacked: "stack",
        embedded: "embedding",
        indexed: "index _unsafe_index",
        gathered: "index_select gather",
        written: "scatter index_copy index_put _unsafe_index_put index_fill masked_scatter slice_scatter select_scatter"
        " fill zero random uniform normal",
        added: "scatter_add scatter_reduce index_add index_reduce",
        copied: "copy",
        created: "zeros_like ones_like empty_like full_like rand_like randn_like randint_like new_zeros new_ones new_empty"
        " new_full new_empty_strided",
    }
    return {name: rule for rule, names in kinds.items() for name in names.split()}


# By an operation's name, that of aten's without its namespace.
RULES: Final = _table()
