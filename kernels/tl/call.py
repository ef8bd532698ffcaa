"""What a pass of lora_linear is given: plain tuples of tensors and numbers, which the caller has checked.

``Settings`` holds what the caller read from the device and from torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from . import configs
from .dropout import threshold
from .quantised.codes import Quantised


@dataclass(frozen=True)
class Settings:
    """``arch``: 90 for sm_90, 0 when interpreted. ``allow_tf32``: torch's own switch for fp32 products.

    ``fixed``: answers that replace those of ``configs``, see ``configs.fixed``.
    """

    arch: int
    allow_tf32: bool = False
    batch_invariant: bool = False
    fixed: tuple[tuple[str, object], ...] = ()

    @property
    def precision(self) -> str:
        """How a product of fp32 tiles is computed."""
        return "tf32" if self.allow_tf32 else "ieee"

    def pick(self, name: str, default: object) -> object:
        """The fixed answer of that name, or the default."""
        return next((value for known, value in self.fixed if known == name), default)

    def config(self, name: str, default: configs.LaunchConfig, itemsize: int) -> configs.LaunchConfig:
        """``pick`` for a launch configuration. Raises ValueError if it is invalid here."""
        config = self.pick(name, default)
        reason = configs.reason_against(config, itemsize, self.arch)
        if reason is not None:
            raise ValueError(f"{name}={config} cannot be used: {reason}")
        return config


class Dropout(NamedTuple):
    """Acts iff p > 0; then there is a seed."""

    p: float = 0.0
    seed: Tensor | None = None

    @property
    def acts(self) -> bool:
        """Whether anything is dropped."""
        return self.p > 0.0

    @property
    def factor(self) -> float:
        """What kept elements are multiplied by."""
        return 1.0 / (1.0 - self.p) if self.acts else 1.0

    @property
    def args(self) -> dict:
        """Run-time arguments of a kernel that drops."""
        return dict(seed=self.seed, threshold=threshold(self.p)) if self.acts else dict(seed=None, threshold=0)


class Scales(NamedTuple):
    """The equation's vectors: of the rank, of the input and of the output, each for base and delta."""

    d: Tensor | None = None
    p_b: Tensor | None = None
    p_d: Tensor | None = None
    g_b: Tensor | None = None
    g_d: Tensor | None = None


class Needs(NamedTuple):
    """Which gradients are wanted."""

    x: bool = False
    A: bool = False
    B: bool = False
    bias: bool = False
    d: bool = False
    p_b: bool = False
    p_d: bool = False
    g_b: bool = False
    g_d: bool = False


class Forward(NamedTuple):
    """``weight`` (N, K), dense or in codes, or None for the identity. ``save_base``: h is wanted."""

    x: Tensor
    weight: Tensor | Quantised | None
    lora_A: Tensor
    lora_B: Tensor
    bias: Tensor | None = None
    scaling: float = 1.0
    dropout: Dropout = Dropout()
    scales: Scales = Scales()
    save_base: bool = False


class Backward(NamedTuple):
    """x is read for dA, dp_b and dp_d, h for dg_b, u for dB, dd and dg_d."""

    dy: Tensor
    x: Tensor | None
    u: Tensor
    h: Tensor | None
    weight: Tensor | Quantised | None
    lora_A: Tensor
    lora_B: Tensor
    scaling: float = 1.0
    dropout: Dropout = Dropout()
    scales: Scales = Scales()
    needs: Needs = Needs()
