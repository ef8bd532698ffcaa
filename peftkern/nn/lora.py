"""LoRALinear: ``nn.Linear`` with a frozen weight and a trainable low-rank branch."""

from __future__ import annotations

import math
import warnings
import weakref
from typing import NoReturn

import torch
from torch import Tensor, nn

from ..autograd.lora_linear import lora_linear
from ..autograd.row_norm import row_norm
from ..autograd.shapes import uncast
from ..bases.base import Base
from ..checks import FLOATING, accumulate_dtype, check_number
from ..methods import quantised
from ..methods.low_rank.dora import dora_linear
from ..ops.dropout_mask import check_p
from .codes import Codes, frozen
from .flat_parameter import trains
from .plain_linear import linear_reason, tensor_reason

# Of DoRA's factors: dividing by less does not bring a merged row back.
_SMALL = 2.0**-6


class LoRALinear(nn.Module):
    """y = x W^T + bias + s (drop(x) A^T) B^T, s = lora_alpha / r (lora_alpha / sqrt(r) with ``use_rslora``).

    With ``use_dora`` y = f * (x (W + s B A)^T) + bias, f[n] = m[n] / |row n of W + s B A|, the norm taken as a constant; in
    training with dropout the function of two base products that ``dora_linear`` shows.

    A drop-in for ``nn.Linear``: same attributes ``in_features``, ``out_features``, ``weight``, ``bias`` and state-dict
    keys, plus ``lora_A`` (r, in_features) and ``lora_B`` (out_features, r). weight and bias are frozen
    (``train_bias=True`` trains the bias); lora_A starts Kaiming-uniform, lora_B zero, and with DoRA ``lora_magnitude``
    (out_features), m, as the norms of the weight's rows, so a new layer equals its base. Matches LoRA (Hu et al. 2021),
    rsLoRA (Kalajdzievski 2023) and DoRA (Liu et al. 2024) as HF PEFT defines them.

    Args:
        in_features, out_features: K and N.
        r: rank, >= 1. lora_alpha: scaling numerator. lora_dropout: drop probability of the branch's input, in [0, 1).
        bias: whether the base has a bias.
        use_rslora: scale by lora_alpha / sqrt(r). use_dora: train magnitudes too.
        train_bias: the bias gets a gradient.
        lora_dtype: dtype of lora_A, lora_B and lora_magnitude, float32 (default) or the weight's.
        device, dtype: of weight and bias, as in ``nn.Linear``.

    A plain ``nn.Linear`` checkpoint loads with ``strict=False``; the magnitudes, which it lacks, become the norms of the
    rows that were loaded. The state dict of a merged layer holds the unmerged weight, up to one rounding. The layer runs
    and trains inside FSDP1 (``use_orig_params=True``) and FSDP2.
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
        linear: nn.Module | Base,
        r: int = 8,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        use_dora: bool = False,
        *,
        train_bias: bool = False,
        lora_dtype: torch.dtype | None = None,
    ) -> LoRALinear:
        """A layer that shares ``linear``'s weight and bias (no copy) and freezes them; other arguments as above.

        ``linear`` is an ``nn.Linear``, a layer that bitsandbytes, torchao, quanto or HQQ has quantised, which is read anew at
        each call, or a base (``peftkern.quantize``), without a bias. Of what is quantised the state dict keeps the keys,
        ``lora_dtype`` may be any of fp32, bf16 and fp16, and ``merge`` raises.

        Raises ValueError for a base without a shape, and TypeError, with the reason, for a ``linear`` that may compute
        something else than x W^T + bias: a subclass, a replaced forward, hooks, parametrizations (weight norm, pruning),
        further parameters or buffers, a weight that is no plain dense tensor (of other quantisers, DTensor) or no parameter of
        its own (inside FSDP).
        """
        if isinstance(linear, Base) or (isinstance(linear, nn.Module) and quantised.reader_of(linear) is not None):
            cls, linear = LoRALinearOnCodes, Codes(linear) if isinstance(linear, Base) else linear
            reason = quantised.reason(linear)
        elif isinstance(linear, nn.Linear):
            reason = linear_reason(linear)
        else:
            raise TypeError(f"linear must be an nn.Linear, got {type(linear).__module__}.{type(linear).__qualname__}")
        if reason is not None:
            raise TypeError(f"linear {reason}")
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._build(linear, r, lora_alpha, lora_dropout, use_rslora, use_dora, train_bias, lora_dtype)
        layer.train(linear.training)
        return layer

    def _build(self, base, r, lora_alpha, lora_dropout, use_rslora, use_dora, train_bias, lora_dtype) -> None:
        if isinstance(r, bool) or not isinstance(r, int):
            raise TypeError(f"r must be an int, got {type(r).__name__}")
        if r < 1:
            raise ValueError(f"r must be at least 1, got {r}")
        check_number("lora_alpha", lora_alpha)
        check_p(lora_dropout, "lora_dropout")
        dtypes = self._lora_dtypes(base)
        lora_dtype = lora_dtype or dtypes[0]
        if lora_dtype not in dtypes:
            raise TypeError(f"lora_dtype must be {' or '.join(map(str, dtypes))} here, got {lora_dtype}")
        self.in_features, self.out_features = base.in_features, base.out_features
        self.r, self.lora_alpha, self.lora_dropout, self.use_rslora = (
            r,
            lora_alpha,
            float(lora_dropout),
            use_rslora,
        )
        self.scaling = lora_alpha / (math.sqrt(r) if use_rslora else r)
        options = {"device": self._hold(base, train_bias), "dtype": lora_dtype}
        self.lora_A = nn.Parameter(torch.empty((r, self.in_features), **options))
        self.lora_B = nn.Parameter(torch.empty((self.out_features, r), **options))
        self.register_parameter("lora_magnitude", None)
        if use_dora:
            self.lora_magnitude = nn.Parameter(torch.empty(self.out_features, **options))
        # Of a merged layer: what was merged (these move with the layer), DoRA's factors, the scaling, and the unmerged
        # weight if others hold it, in a tuple, where it is no parameter of this layer.
        for name in ("_merged_A", "_merged_B", "_merged_factor"):
            self.register_buffer(name, None, persistent=False)
        self._merged_scaling = 1.0
        self._unmerged: tuple[Tensor, ...] = ()
        self.register_state_dict_post_hook(_unmerged_state)
        self.register_load_state_dict_pre_hook(_before_loading)
        self.register_load_state_dict_post_hook(_after_loading)
        self._lacks_magnitude = False
        self.reset_lora_parameters()

    @staticmethod
    def _lora_dtypes(base: nn.Module) -> list[torch.dtype]:
        """Those that adapters of this layer may have, the usual one first."""
        dtype = base.weight.dtype
        return list(dict.fromkeys((accumulate_dtype(dtype), torch.float32, dtype)))

    def _hold(self, base: nn.Module, train_bias: bool) -> torch.device:
        """Keep the weight, frozen, and the bias. Returns where they are."""
        self.weight = base.weight.requires_grad_(False)
        if base.bias is None:
            self.register_parameter("bias", None)
        else:
            self.bias = base.bias.requires_grad_(train_bias)
        return self.weight.device

    def reset_parameters(self) -> None:
        """All parameters as those of a new layer, after ``to_empty`` for one: weight and bias as ``nn.Linear`` starts them.

        Raises RuntimeError while merged.
        """
        if self.merged:
            raise RuntimeError("reset_parameters: the layer is merged; call unmerge() first")
        nn.Linear.reset_parameters(self)
        self.reset_lora_parameters()

    def reset_lora_parameters(self) -> None:
        """lora_A Kaiming-uniform (a = sqrt 5), lora_B zero, magnitudes the weight's: the layer equals its base.

        Raises RuntimeError while merged.
        """
        if self.merged:
            raise RuntimeError("reset_lora_parameters: the layer is merged; call unmerge() first")
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)
        self._reset_magnitude()

    def _reset_magnitude(self) -> None:
        if self.use_dora and not self.weight.is_meta:
            self._check_weight("lora_magnitude")
            with torch.no_grad():
                self.lora_magnitude.copy_(self._norm())

    def _norm(self) -> Tensor:
        return row_norm(self.weight.detach(), self.lora_A, self.lora_B, self.scaling)

    @property
    def use_dora(self) -> bool:
        """Whether the layer has magnitudes."""
        return self._parameters["lora_magnitude"] is not None

    @property
    def merged(self) -> bool:
        """Whether ``weight`` holds the branch."""
        return self._buffers["_merged_A"] is not None

    def get_delta_weight(self) -> Tensor:
        """s B A, (out_features, in_features), in fp32 (fp64 for an fp64 layer)."""
        return self._product(self.lora_A, self.lora_B, self.scaling)

    def _product(self, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
        dtype = accumulate_dtype(self.weight.dtype)
        return (lora_B.to(dtype) @ lora_A.to(dtype)) * scaling

    def _without_merged(self) -> Tensor:
        """The weight of before merge(): itself if it is still there, else up to one rounding."""
        weight = self.weight.detach()
        for kept in self._unmerged:
            if (kept.dtype, kept.device, kept.shape) == (weight.dtype, weight.device, weight.shape):
                return kept
        delta = self._product(self._merged_A, self._merged_B, self._merged_scaling)
        total = weight.to(delta.dtype)
        if self._merged_factor is not None:
            total = total / self._merged_factor[:, None]
        return (total - delta).to(weight.dtype)

    def _set_weight(self, values: Tensor) -> None:
        # In place only where nobody else sees it: not another layer, nor whoever holds the weight in another tensor. That
        # shows when this layer lets go of it.
        held, data = weakref.ref(self.weight), self.weight.detach()
        if data.untyped_storage().nbytes() != data.nbytes or "weight" in self.__dict__:
            warnings.warn("the weight is a part of a larger tensor, which changes with it, in place", stacklevel=3)
            data.copy_(values)
            return
        self._parameters["weight"] = None  # its place among the parameters stays
        others = held()
        storage = data.untyped_storage()
        if (
            others is None
            and torch._C._storage_Use_Count(storage._cdata) <= 2
            and not (data.is_cpu and data.is_shared())
        ):
            values = data.copy_(values)
        else:
            self._unmerged = () if others is None else (others,)
        self.weight = nn.Parameter(values, requires_grad=False)

    def _check_weight(self, what: str) -> None:
        weight, shape = self.weight, (self.out_features, self.in_features)
        reason = tensor_reason(weight)
        if reason is None and weight.is_meta:
            reason = "is on the meta device: its values are elsewhere (offloaded)"
        if reason is None and weight.shape != shape:
            reason = f"has shape {tuple(weight.shape)}, expected {shape} (of FSDP: inside summon_full_params)"
        if reason is not None:
            raise RuntimeError(f"{what}: the weight {reason}")

    def merge(self) -> None:
        """weight += s B A, with DoRA times f, in place, rounded once. A second call does nothing. Training while merged raises.

        What others hold stays as it is: if the weight is tied to another layer's, or anything else has it (an optimizer
        that lists it, a state dict), this layer gets a weight of its own until ``unmerge``. Only a weight that is a
        part of a larger tensor (FSDP1's flat parameter) always changes in place, with a warning. The layer remembers
        what it merged: an adapter that is changed while merged takes effect after ``unmerge``. Where DoRA makes a row
        (nearly) zero, the unmerged weight is kept too.

        Raises RuntimeError for a weight that has become something else since: quantised, sharded, offloaded.
        """
        if self.merged:
            return
        self._check_weight("merge")
        with torch.inference_mode(False), torch.no_grad():
            factor = None
            if self.use_dora:
                factor = self.lora_magnitude.to(accumulate_dtype(self.weight.dtype)) / self._norm()
            # A variable of this function that has the weight holds it.
            held = self.weight if factor is not None and bool((factor.abs() < _SMALL).any()) else None
            self._set_weight(_rounded(self.weight, self.get_delta_weight(), factor))
            del held
            self._merged_A, self._merged_B = self.lora_A.detach().clone(), self.lora_B.detach().clone()
            self._merged_factor = factor
        self._merged_scaling = self.scaling

    def unmerge(self) -> None:
        """The weight of before ``merge``: the same tensor if others hold it, else up to one rounding, in place.

        Nothing if the layer is not merged. Raises as ``merge`` does.
        """
        if not self.merged:
            return
        self._check_weight("unmerge")
        with torch.inference_mode(False), torch.no_grad():
            before = self._without_merged()
            if any(before is kept for kept in self._unmerged):
                self.weight = before
            else:
                self._set_weight(before)
        self._merged_A = self._merged_B = self._merged_factor = None
        self._unmerged = ()

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        weight, bias, magnitude = self.weight, self.bias, self.lora_magnitude
        if self.merged:
            if self.training and torch.is_grad_enabled():
                raise RuntimeError("the layer is merged: call unmerge() before training, or eval()")
            return nn.functional.linear(x, weight, bias)
        if weight.requires_grad and not trains(self, "weight", weight):
            weight = weight.detach()
            bias = bias if bias is None or trains(self, "bias", bias) else bias.detach()
            if magnitude is not None and not trains(self, "lora_magnitude", magnitude):
                magnitude = magnitude.detach()
        return self._adapted(x, weight, bias, magnitude)

    def _adapted(self, x: Tensor, weight: Tensor | Base, bias: Tensor | None, magnitude: Tensor | None) -> Tensor:
        options = {
            "bias": bias,
            "scaling": self.scaling,
            "dropout_p": self.lora_dropout,
            "training": self.training,
        }
        if magnitude is not None:
            return dora_linear(x, weight, self.lora_A, self.lora_B, magnitude, **options)
        return lora_linear(x, weight, self.lora_A, self.lora_B, **options)

    def extra_repr(self) -> str:
        """The arguments, as ``print`` shows them."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"r={self.r}, lora_alpha={self.lora_alpha}, lora_dropout={self.lora_dropout}, use_dora={self.use_dora}, "
            f"merged={self.merged}"
        )


class LoRALinearOnCodes(LoRALinear):
    """What ``LoRALinear.from_linear`` makes of a quantised layer, which it holds as ``base_layer`` and reads at each call.

    Keys of the state dict are the layer's own. ``merge`` is refused.
    """

    def _build(self, *args) -> None:
        super()._build(*args)
        self.register_state_dict_post_hook(_own_keys)
        self.register_load_state_dict_pre_hook(_layers_keys)

    @staticmethod
    def _lora_dtypes(base: nn.Module) -> list[torch.dtype]:
        return list(FLOATING[:3])

    def _hold(self, base: nn.Module, train_bias: bool) -> torch.device:
        self.base_layer = base.requires_grad_(False)
        if isinstance(base.bias, nn.Parameter):
            base.bias.requires_grad_(train_bias)
        elif train_bias:
            raise TypeError("train_bias: the bias of this layer is no parameter")
        return frozen(self.base_layer).weight.device

    @property
    def weight(self) -> Tensor:
        """The library's, in its class: of HQQ the codes."""
        return self.base_layer.weight if hasattr(self.base_layer, "weight") else self.base_layer.W_q

    @property
    def bias(self) -> Tensor | None:
        """The layer's."""
        return self.base_layer.bias

    def reset_parameters(self) -> None:
        """The adapter's parameters as those of a new layer; the base in codes stays as it is."""
        self.reset_lora_parameters()

    def _reset_magnitude(self) -> None:
        if self.use_dora:
            with torch.no_grad():
                self.lora_magnitude.copy_(
                    row_norm(frozen(self.base_layer).weight, self.lora_A, self.lora_B, self.scaling)
                )

    def merge(self) -> NoReturn:
        """RuntimeError: the sum would have to be rounded to codes anew, and unmerged another time."""
        raise RuntimeError(
            "merge: the weight is in codes, and its sum with the branch would be rounded to codes anew: dequantise the "
            "layer before, or keep the branch"
        )

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        weight, bias, uncasts = frozen(self.base_layer)
        if not isinstance(self.bias, nn.Parameter):  # HQQ has computed it from one
            bias = None if bias is None else bias.detach()
        if uncasts:  # as the library's layer, which has the dtype of x under autocast too
            with uncast(x):
                return self._adapted(x, weight, bias, self.lora_magnitude)
        return self._adapted(x, weight, bias, self.lora_magnitude)


def _own_keys(module: LoRALinearOnCodes, state: dict, prefix: str, local_metadata: dict) -> None:
    for key in [key for key in state if key.startswith(prefix + "base_layer.")]:
        state[prefix + key.removeprefix(prefix + "base_layer.")] = state.pop(key)


def _layers_keys(module: LoRALinearOnCodes, state: dict, prefix: str, *args) -> None:
    for key in [key for key in state if key.startswith(prefix) and not key.startswith(prefix + "lora_")]:
        state[prefix + "base_layer." + key.removeprefix(prefix)] = state.pop(key)


def _rounded(weight: Tensor, delta: Tensor, factor: Tensor | None) -> Tensor:
    total = weight.to(delta.dtype) + delta
    return (total if factor is None else total.mul_(factor[:, None])).to(weight.dtype)


def _unmerged_state(module: LoRALinear, state: dict, prefix: str, local_metadata: dict) -> None:
    if module.merged:
        with torch.no_grad():
            state[prefix + "weight"] = module._without_merged().detach()


def _before_loading(module: LoRALinear, state: dict, prefix: str, *args) -> None:
    # A checkpoint holds the unmerged weight, so a merged layer is one no longer after loading it.
    module.unmerge()
    module._lacks_magnitude = prefix + "weight" in state and prefix + "lora_magnitude" not in state


def _after_loading(module: LoRALinear, incompatible_keys) -> None:
    if module._lacks_magnitude:
        module._lacks_magnitude = False
        module._reset_magnitude()
