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
from .reft import VARIANTS

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

    @classmethod
    def of_reft(
        cls, rotate: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, variant: str = "loreft",
        activation: str = "identity",
    ) -> Bottleneck:  # fmt: skip
        """What ``reft`` does to a row that it edits, as a bottleneck: sequences of a batch then take ReFT adapters of their own.

            h + f(h W^T + b) R - h R^T R = h + f(h (W - R)^T + b) R       where f is the identity, or nothing is subtracted

        Arguments as in ``reft``, whose dropout of whole rows is left out. Rows that no position names take the id -1: with the
        adapters ``chosen`` (B) and positions (B, P), all of them some, the ids are
        ``torch.full((B, T), -1).scatter(1, positions, chosen[:, None].expand_as(positions)).flatten()``.

        Raises ValueError for an unknown variant, a source where it has none or the lack of what it has, and an activation
        where something is subtracted from what it gives.
        """
        if variant not in VARIANTS:
            raise ValueError(f"variant is {variant!r}, expected one of {', '.join(VARIANTS)}")
        known = VARIANTS[variant]
        if (weight is None) == known.source or (bias is None and not known.source):
            raise ValueError(
                f"{variant} is made of {'a weight' if known.source else 'a bias alone'} beside its rotation"
            )
        if activation != "identity" and (known.subtracts or not known.source):
            raise ValueError(f"activation is {activation!r}, but {variant} is a bottleneck with the identity alone")
        down = torch.zeros_like(rotate) if weight is None else weight
        return cls(down - rotate if known.subtracts else down, rotate.t(), bias, activation=activation)

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
            bias = bias.to(accumulate_dtype(bias.dtype))
            bias = bias if factor == 1.0 else bias * float(factor)
            bias = bias if scale is None else bias * scale
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
        return y.add_(residual)
