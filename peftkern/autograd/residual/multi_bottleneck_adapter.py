"""Bottleneck adapters in the residual stream, another one for every row: multi_lora_linear on the identity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...bases.base import Base
from ...checks import accumulate_dtype, check_factor, check_fits, check_number, check_tensor
from ...many.adapter import Adapter
from ...many.bank import AdapterBank
from ..multi_lora_linear import BRANCH, multi_lora_linear
from ..shapes import uncast

_IDENTITY = Base("identity", ())


@dataclass(frozen=True, eq=False)
class Bottleneck:
    """One adapter of a batch, with what ``bottleneck_adapter`` takes: scaling * out_scale * (f(h D^T + down_bias) U^T + up_bias).

    down (R, K), up (N, R), down_bias (R), up_bias (N), out_scale (N); scaling a float or a one-element tensor.
    """

    down: Tensor
    up: Tensor
    down_bias: Tensor | None = None
    up_bias: Tensor | None = None
    activation: str = "relu"
    scaling: float | Tensor = 1.0
    out_scale: Tensor | None = None

    def adapter(self) -> Adapter:
        """The same as coefficients of multi_lora_linear's equation, where a bias is added after the scales."""
        check_tensor("up", self.up)
        factor, scale, bias = self.scaling, self.out_scale, self.up_bias
        for name, vector in (("up_bias", bias), ("out_scale", scale)):
            if vector is not None:
                check_fits(name, vector, self.up.shape[:1], "(N,)", self.up.device, (self.up.dtype, torch.float32))
        if isinstance(factor, Tensor):
            check_factor("scaling", factor, self.up.device, "up")
            factor = factor.reshape(1).to(accumulate_dtype(factor.dtype))
            scale = factor.expand(self.up.shape[0]) if scale is None else factor * scale
            factor = 1.0
        check_number("scaling", factor)
        if bias is not None:
            wide = bias.to(accumulate_dtype(bias.dtype)) * float(factor)
            bias = wide if scale is None else wide * scale
        return Adapter(
            self.down, self.up, float(factor), bias=bias, rank_bias=self.down_bias, activation=self.activation,
            delta_out_scale=scale,
        )  # fmt: skip


def multi_bottleneck_adapter(
    h: Tensor,
    adapters: Sequence[Bottleneck] | AdapterBank,
    adapter_ids: Tensor,
    *,
    residual: Tensor | None = None,
    dropout_p: float | Sequence[float] = 0.0,
    training: bool = False,
    seed: int | Tensor | None = None,
) -> Tensor:
    """The residual stream with another bottleneck adapter for every row, or none.

        y_t = residual_t + scaling[a] out_scale[a] * (f[a](drop(h_t) D[a]^T + down_bias[a]) U[a]^T + up_bias[a])

    with a the adapter of row t; widths, activations, biases and scales of any mix. Differentiable in h, the residual and every
    tensor of a listed adapter.

    Args:
        h: (..., K) in fp32, bf16 or fp16 (fp64 through the reference).
        adapters: a Bottleneck each, matrices in fp32 or h's dtype (all alike, or they are taken in fp32); or an AdapterBank
            of adapters with an activation, whose tensors get no gradient.
        adapter_ids: as in ``multi_lora_linear``: one per row or one per leading index; -1 leaves a row as it is.
        residual: (..., N) in h's dtype, what is added to; None: h itself, and N is K.
        dropout_p, training, seed: as in ``multi_lora_linear``, of h.

    Returns:
        (..., N) in h's dtype. A row has the same bits whatever else is in the batch.

    Raises:
        ValueError, TypeError, RuntimeError: as ``multi_lora_linear``.
    """
    if not isinstance(adapters, AdapterBank):
        if isinstance(adapters, (str, bytes, Tensor)) or not isinstance(adapters, Sequence):
            raise TypeError(
                f"adapters must be a sequence of Bottleneck or an AdapterBank, got {type(adapters).__name__}"
            )
        for i, each in enumerate(adapters):
            if not isinstance(each, Bottleneck):
                raise TypeError(f"adapters[{i}] must be a Bottleneck, got {type(each).__name__}")
        adapters = [each.adapter() for each in adapters]
    check_tensor("h", h)
    base = _IDENTITY if residual is None or residual is h else BRANCH
    with uncast(h):
        y = multi_lora_linear(h, base, adapters, adapter_ids, dropout_p=dropout_p, training=training, seed=seed)
        if base is _IDENTITY:
            return y
        check_fits("residual", residual, y.shape, "(..., N)", h.device, (h.dtype,))
        return residual + y
