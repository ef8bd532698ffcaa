"""BottleneckAdapter: the module around ``bottleneck_adapter``."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..activations import activation_name
from ..autograd.residual.bottleneck_adapter import bottleneck_adapter
from ..checks import check_number
from ..ops.dropout_mask import check_p


class BottleneckAdapter(nn.Module):
    """y = residual + gate * drop(scaling * (f(h down^T + down_bias) up^T + up_bias)), started as y = residual.

    One module at each place that a method has: after attention and after the feed-forward part (Houlsby), after the
    latter alone (Pfeiffer), beside it (``adapter(h, residual=ffn(h))``, He's parallel adapter and AdaptFormer), before a
    linear layer (``linear(adapter(x))``), after it, or beside it (``adapter(x, residual=linear(x))``, LLM-Adapters). A
    layer norm stands outside: ``adapter(norm(h), residual=h)`` before, ``norm(adapter(h))`` after.

    Args:
        hidden, bottleneck: K, which is N too unless ``out`` says otherwise, and R.
        activation, dropout, dropout_on: as in ``bottleneck_adapter``.
        scaling: a number; "learned", one trained number; "channel", one of each output (AdapterPlus).
        gate: each sequence's branch is scaled by the mean of sigmoid(h g + g0) over its tokens (UniPELT); h is (B, T, K).
        bias: whether down and up have biases.
        device, dtype: of the parameters; fp32, or that of h.

    ``down`` starts Kaiming-uniform, ``up`` and the biases zero, learned scalings 1.
    """

    def __init__(
        self,
        hidden: int,
        bottleneck: int,
        activation: str = "relu",
        scaling: float | str = 1.0,
        dropout: float = 0.0,
        dropout_on: str = "output",
        gate: bool = False,
        bias: bool = True,
        *,
        out: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dropout_on not in ("output", "input"):
            raise ValueError(f"dropout_on is {dropout_on!r}, expected 'output' or 'input'")
        check_p(dropout, "dropout")
        if isinstance(scaling, str) and scaling not in ("learned", "channel"):
            raise ValueError(f"scaling is {scaling!r}, expected a number, 'learned' or 'channel'")
        self.hidden, self.bottleneck, self.out = hidden, bottleneck, hidden if out is None else out
        self.activation, self.dropout, self.dropout_on = activation_name(activation), float(dropout), dropout_on
        options = {"device": device, "dtype": dtype}

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, **options))

        self.down, self.up = parameter(bottleneck, hidden), parameter(self.out, bottleneck)
        self.down_bias = parameter(bottleneck) if bias else None
        self.up_bias = parameter(self.out) if bias else None
        self.scaling, self.out_scale = scaling, None
        if scaling == "learned":
            self.scaling = parameter(1)
        elif scaling == "channel":
            self.scaling, self.out_scale = 1.0, parameter(self.out)
        else:
            check_number("scaling", scaling)
        self.gate = nn.Linear(hidden, 1, **options) if gate else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The values of a new module, which gives its residual."""
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
        for zero in (self.up, self.down_bias, self.up_bias):
            if zero is not None:
                nn.init.zeros_(zero)
        for one in (self.scaling, self.out_scale):
            if isinstance(one, Tensor):
                nn.init.ones_(one)
        if self.gate is not None:
            self.gate.reset_parameters()

    def forward(self, h: Tensor, residual: Tensor | None = None) -> Tensor:
        """(..., hidden) and (..., out) -> (..., out). ``residual``: None for h."""
        gate = None
        if self.gate is not None:
            if h.dim() != 3:
                raise ValueError(f"h has shape {tuple(h.shape)}, expected (B, T, K) for a gate of each sequence")
            gate = torch.sigmoid(self.gate(h.to(self.gate.weight.dtype))).mean(1, keepdim=True)
        return bottleneck_adapter(
            h, self.down, self.up, down_bias=self.down_bias, up_bias=self.up_bias, activation=self.activation,
            scaling=self.scaling, residual=residual, gate=gate, out_scale=self.out_scale, dropout_p=self.dropout,
            dropout_on=self.dropout_on, training=self.training,
        )  # fmt: skip

    def extra_repr(self) -> str:
        """The arguments, as ``print`` shows them."""
        scaling = "channel" if self.out_scale is not None else self.scaling
        return (
            f"hidden={self.hidden}, bottleneck={self.bottleneck}, activation={self.activation}, "
            f"scaling={'learned' if isinstance(scaling, Tensor) else scaling}, dropout={self.dropout}, "
            f"dropout_on={self.dropout_on}, bias={self.down_bias is not None}, out={self.out}"
        )
