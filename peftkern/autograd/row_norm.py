"""Row norms for callers above the ops: constants of the graph, whatever their arguments are.

Nothing is kept from call to call. W alone stays the same, and its part of a norm is not worth keeping: the adapters'
part reads all of W again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..bases.base import Base, base_of
from ..checks import accumulate_dtype, check_factor, check_number, check_tensor
from ..dispatch.registry import caller
from .shapes import cast

_norm = caller("lora_row_norm")


def row_norm(weight: Tensor | Base, lora_A: Tensor, lora_B: Tensor, scaling: float | Tensor = 1.0) -> Tensor:
    """Norms of the rows of an adapted weight, which DoRA (Liu et al. 2024, section 4.3) takes as constants.

        norm[n] = sqrt(sum_k (W[n, k] + s sum_r B[n, r] A[r, k])^2)

    Args:
        weight: (N, K) in fp32, bf16 or fp16 (fp64 through the reference), any strides, or a base (peftkern/bases).
        lora_A: (R, K). lora_B: (N, R). Both in fp32 or both in the weight's dtype.
        scaling: s, a float or a one-element tensor on the weight's device (not synchronised to the host).

    Returns:
        (N,) in fp32 (fp64 for fp64), without a gradient; the same under autocast.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.
    """
    base = base_of(weight)
    with torch.no_grad():
        if isinstance(scaling, Tensor):
            for name, t in (("lora_A", lora_A), ("lora_B", lora_B)):
                check_tensor(name, t)
            check_factor("scaling", scaling, lora_B.device, "lora_B")
            dtype = accumulate_dtype(lora_B.dtype)
            lora_A, lora_B, scaling = cast(lora_A, dtype), lora_B.to(dtype) * scaling.to(dtype).reshape(1), 1.0
        check_number("scaling", scaling)
        return _norm(list(base.tensors), base.kind, lora_A, lora_B, float(scaling))
