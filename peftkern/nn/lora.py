"""LoRALinear: ``nn.Linear`` with a frozen weight and a trainable low-rank branch."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..autograd.lora_linear import lora_linear
from ..ops.checks import check_number
from ..ops.dropout_mask import check_p


class LoRALinear(nn.Module):
    """y = x W^T + bias + s (drop(x) A^T) B^T, s = lora_alpha / r (lora_alpha / sqrt(r) with ``use_rslora``).

    A drop-in for ``nn.Linear``: same attributes ``in_features``, ``out_features``, ``weight``, ``bias`` and state-dict
    keys, plus ``lora_A`` (r, in_features) and ``lora_B`` (out_features, r). weight and bias are frozen
    (``train_bias=True`` trains the bias); lora_A starts Kaiming-uniform, lora_B zero, so a new layer equals its base.
    Matches LoRA (Hu et al. 2021) and rsLoRA (Kalajdzievski 2023) as HF PEFT defines them.

    Args:
        in_features, out_features: K and N.
        r: rank, >= 1. lora_alpha: scaling numerator. lora_dropout: drop probability of the branch's input, in [0, 1).
        bias: whether the base has a bias.
        use_rslora: scale by lora_alpha / sqrt(r). use_dora: not available, raises NotImplementedError.
        train_bias: the bias gets a gradient.
        lora_dtype: dtype of lora_A and lora_B, float32 (default) or the weight's.
        device, dtype: of weight and bias, as in ``nn.Linear``.

    A plain ``nn.Linear`` checkpoint loads with ``strict=False``. The state dict of a merged layer holds the unmerged
    weight, up to one rounding.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 8,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        bias: bool = True,
        use_rslora: bool = False,
        use_dora: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        train_bias: bool = False,
        lora_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        base = nn.Linear(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self._build(base, r, lora_alpha, lora_dropout, use_rslora, use_dora, train_bias, lora_dtype)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        r: int = 8,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        use_dora: bool = False,
        *,
        train_bias: bool = False,
        lora_dtype: torch.dtype | None = None,
    ) -> LoRALinear:
        """A layer that shares ``linear``'s weight and bias (no copy) and freezes them; other arguments as above."""
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear must be an nn.Linear, got {type(linear).__name__}")
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._build(linear, r, lora_alpha, lora_dropout, use_rslora, use_dora, train_bias, lora_dtype)
        layer.train(linear.training)
        return layer

    def _build(self, base, r, lora_alpha, lora_dropout, use_rslora, use_dora, train_bias, lora_dtype) -> None:
        if use_dora:
            raise NotImplementedError("use_dora=True: DoRA (weight-decomposed LoRA) is not implemented")
        if isinstance(r, bool) or not isinstance(r, int):
            raise TypeError(f"r must be an int, got {type(r).__name__}")
        if r < 1:
            raise ValueError(f"r must be at least 1, got {r}")
        check_number("lora_alpha", lora_alpha)
        check_p(lora_dropout, "lora_dropout")
        weight = base.weight
        lora_dtype = lora_dtype or (torch.float64 if weight.dtype == torch.float64 else torch.float32)
        if lora_dtype not in (torch.float32, weight.dtype):
            raise TypeError(f"lora_dtype must be torch.float32 or the weight's {weight.dtype}, got {lora_dtype}")
        self.in_features, self.out_features = base.in_features, base.out_features
        self.r, self.lora_alpha, self.lora_dropout, self.use_rslora = (
            r,
            lora_alpha,
            float(lora_dropout),
            use_rslora,
        )
        self.scaling = lora_alpha / (math.sqrt(r) if use_rslora else r)
        self.weight = weight.requires_grad_(False)
        if base.bias is None:
            self.register_parameter("bias", None)
        else:
            self.bias = base.bias.requires_grad_(train_bias)
        options = {"device": weight.device, "dtype": lora_dtype}
        self.lora_A = nn.Parameter(torch.empty((r, self.in_features), **options))
        self.lora_B = nn.Parameter(torch.empty((self.out_features, r), **options))
        self._merged = False
        self.register_state_dict_post_hook(_unmerged_state)
        self.register_load_state_dict_pre_hook(_load_unmerged)
        self.reset_lora_parameters()

    def reset_lora_parameters(self) -> None:
        """lora_A Kaiming-uniform (a = sqrt 5), lora_B zero: the branch is zero. Raises RuntimeError while merged."""
        if self._merged:
            raise RuntimeError("reset_lora_parameters: the layer is merged; call unmerge() first")
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    @property
    def merged(self) -> bool:
        """Whether ``weight`` holds the branch."""
        return self._merged

    def get_delta_weight(self) -> Tensor:
        """s B A, (out_features, in_features), in fp32 (fp64 for an fp64 layer)."""
        dtype = torch.float64 if self.weight.dtype == torch.float64 else torch.float32
        return (self.lora_B.to(dtype) @ self.lora_A.to(dtype)) * self.scaling

    @torch.no_grad()
    def _add(self, sign: float) -> None:
        delta = self.get_delta_weight()
        self.weight.copy_(self.weight.to(delta.dtype) + sign * delta)

    def merge(self) -> None:
        """weight += s B A, in place, rounded once. A second call does nothing. Training while merged raises."""
        if not self._merged:
            self._add(1.0)
            self._merged = True

    def unmerge(self) -> None:
        """weight -= s B A, in place: the weight of before, up to one rounding. Nothing if it is not merged."""
        if self._merged:
            self._add(-1.0)
            self._merged = False

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        if self._merged:
            if self.training and torch.is_grad_enabled():
                raise RuntimeError("the layer is merged: call unmerge() before training, or eval()")
            return nn.functional.linear(x, self.weight, self.bias)
        return lora_linear(
            x,
            self.weight,
            self.lora_A,
            self.lora_B,
            bias=self.bias,
            scaling=self.scaling,
            dropout_p=self.lora_dropout,
            training=self.training,
        )

    def extra_repr(self) -> str:
        """The arguments, as ``print`` shows them."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"r={self.r}, lora_alpha={self.lora_alpha}, lora_dropout={self.lora_dropout}, merged={self._merged}"
        )


def _unmerged_state(module: LoRALinear, state: dict, prefix: str, local_metadata: dict) -> None:
    if module._merged:
        weight, delta = module.weight.detach(), module.get_delta_weight().detach()
        state[prefix + "weight"] = (weight.to(delta.dtype) - delta).to(weight.dtype)


def _load_unmerged(module: LoRALinear, *args) -> None:
    # A checkpoint holds the unmerged weight, so a merged layer is one no longer after loading it.
    module.unmerge()
