"""Row norms for callers above the ops: constants of the graph, whatever their arguments are.

Nothing is kept from call to call. W alone stays the same, and its part of a norm is not worth keeping: the adapters'
part reads all of W again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..bases.base import Base, base_of, check_shape
from ..checks import accumulate_dtype, check_factor, check_number, check_tensor
from ..dispatch.registry import caller
from .shapes import autocast_dtype, cast

_norm = caller("lora_row_norm")


def row_norm(weight: Tensor | Base, lora_A: Tensor, lora_B: Tensor, scaling: float | Tensor = 1.0) -> Tensor:
    """Norms of the rows of an adapted weight, which DoRA (Liu et al. 2024, section 4.3) takes as constants.

        norm[n] = sqrt(sum_k (W[n, k] + s sum_r B[n, r] A[r, k])^2)

    Args:
        weight: (N, K) in fp32, bf16 or fp16 (fp64 through the reference), any strides, or a base (peftkern/bases).
        lora_A: (R, K). lora_B: (N, R). Both in fp32 or both in the weight's dtype.
        scaling: s, a float or a one-element tensor on the weight's device (not synchronised to the host).

    Returns:
        (N,) in fp32 (fp64 for fp64), without a gradient; the same under autocast, which takes adapters of any dtype.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.
    """
    base, factor = base_of(weight), isinstance(scaling, Tensor)
    check_tensor("lora_A", lora_A)
    check_tensor("lora_B", lora_B)
    if lora_A.dim() and lora_B.dim():
        check_shape(base, lora_B.shape[0], lora_A.shape[-1], "lora_B and lora_A")
    check_factor("scaling", scaling, lora_B.device, "lora_B") if factor else check_number("scaling", scaling)
    with torch.no_grad():
        if factor or autocast_dtype(lora_A) is not None:
            lora_A, lora_B = (cast(t, accumulate_dtype(t.dtype)) for t in (lora_A, lora_B))
        if factor:
            lora_B, scaling = lora_B * scaling.to(lora_B.dtype).reshape(1), 1.0
        return _norm(list(base.tensors), base.kind, lora_A, lora_B, float(scaling))
