"""The base product of lora_linear on CPU: ``(a * s) W^T`` (forward) or ``(a * s) W`` (input gradient), W frozen.

``base_product`` fills ``out`` block by block and calls ``epilogue`` when a block's product is complete, so that the
branch, the scales and the bias can be added while it is in cache and before the one rounding to half precision.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

# epilogue(row0, row1, col0, col1, panel): the raw product of out[row0:row1, col0:col1] is complete. ``panel`` is that
# block in fp32 (rows x cols, stride(1) == 1; scratch that is reused after the call) and the epilogue writes ``out``;
# or None: the product already lies in ``out``, in its dtype, and the epilogue works in place.
# The blocks of one call cover ``out`` once, in a fixed order; they are never empty.
Epilogue = Callable[[int, int, int, int, torch.Tensor | None], None]


def base_product(
    a: torch.Tensor,
    weight: torch.Tensor,
    *,
    transpose: bool,
    in_scale: torch.Tensor | None,
    out: torch.Tensor,
    epilogue: Epilogue,
) -> None:
    """``out = (a * in_scale) W^T`` if ``transpose`` else ``(a * in_scale) W``, finished by ``epilogue``.

    a (M, C) any strides; weight (N, K) any strides; in_scale (C,) or None, fp32 or a.dtype; out (M, D) contiguous, in
    a.dtype, contents ignored. C, D = K, N if ``transpose`` (forward) else N, K. All three matrices have one dtype of
    float32, bfloat16, float16. Nothing is called if out is empty; with C == 0 the product is zero.
    """
    if out.numel() == 0:
        return
    b = weight.t() if transpose else weight
    if in_scale is not None:
        a = (a * in_scale.float()).to(a.dtype)
    torch.mm(a, b, out=out)
    epilogue(0, out.shape[0], 0, out.shape[1], None)
