"""ReFT: the module around ``reft``, and the positions that it edits."""

from __future__ import annotations

import math
import re

import torch
from torch import Tensor, nn

from ..activations import activation_name
from ..autograd.residual.reft import VARIANTS, reft
from ..checks import check_tensor
from ..ops.dropout_mask import check_p
from .orthogonal import Rotation, free_numbers

ORTHONORMAL = ("loreft", "direft", "consreft", "lobireft")
# The classes of the activations that pyreft takes from transformers.
_PYREFT_ACTIVATIONS = {
    "LinearActivation": "identity", "ReLU": "relu", "LeakyReLU": "leaky_relu", "GELUActivation": "gelu",
    "NewGELUActivation": "gelu_tanh", "SiLUActivation": "silu", "SiLU": "silu", "Tanh": "tanh", "Sigmoid": "sigmoid",
}  # fmt: skip


class ReFT(nn.Module):
    """Edits listed rows of a hidden state: ``reft`` with parameters (Wu et al. 2024), started as pyreft starts them.

    ``rotate`` (r, H) is R itself in noreft and nodireft. In the others it is free numbers, of which ``orthonormal`` makes
    R: those that torch's orthogonal parametrisation has, by its Householder map without ``base``. R is made once a call
    while it trains. Otherwise, on the CPU, it is made once and kept until the numbers differ; elsewhere a look at them would
    make the host wait.

    Args:
        hidden, rank: H and r, 1 <= r <= H.
        variant, activation, dropout: as in ``reft``. bias: whether a source W h + b has b.
        device, dtype: of the parameters; fp32 or fp64, what free numbers need.
    """

    def __init__(
        self,
        hidden: int,
        rank: int,
        variant: str = "loreft",
        activation: str = "identity",
        dropout: float = 0.0,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if variant not in VARIANTS:
            raise ValueError(f"variant is {variant!r}, expected one of {', '.join(VARIANTS)}")
        if not 1 <= rank <= hidden:
            raise ValueError(f"rank is {rank}, expected 1 to hidden = {hidden}")
        if dtype not in (torch.float32, torch.float64):
            raise TypeError(f"dtype is {dtype}, expected torch.float32 or torch.float64")
        check_p(dropout, "dropout")
        self.hidden, self.rank, self.variant = hidden, rank, variant
        self.activation, self.dropout = activation_name(activation), float(dropout)
        source, options = VARIANTS[variant].source, {"device": device, "dtype": dtype}
        self.rotate = nn.Parameter(torch.empty(rank, hidden, **options))
        self.weight = nn.Parameter(torch.empty(rank, hidden, **options)) if source else None
        self.bias = nn.Parameter(torch.empty(rank, **options)) if bias or not source else None
        self._rotation = Rotation()
        self.reset_parameters()

    @classmethod
    @torch.no_grad()
    def from_pyreft(cls, intervention: nn.Module) -> ReFT:
        """A module with the parameters of an intervention of pyreft's (``LoreftIntervention`` and so on), in the dtype of its
        rotation. pyreft calls an intervention on the listed rows alone, this module takes h and the positions.

        Raises ValueError for another class, an activation not in ``ACTIVATIONS``, or a projection with a bias (``add_bias``)
        beside an activation, which no variant has.
        """
        variant = type(intervention).__name__.removesuffix("Intervention").lower()
        if variant not in VARIANTS:
            raise ValueError(f"intervention is a {type(intervention).__name__}, expected one of pyreft's")
        known = VARIANTS[variant]
        f = type(intervention.act_fn).__name__ if known.source else "LinearActivation"
        if f not in _PYREFT_ACTIVATIONS:
            raise ValueError(f"the activation {f} of intervention is not one of {', '.join(_PYREFT_ACTIVATIONS)}")
        orthonormal, source = variant in ORTHONORMAL, intervention.learned_source
        R = intervention.rotate_layer.weight.mT if orthonormal else intervention.proj_layer.weight
        less = intervention.proj_layer.bias if not orthonormal and known.subtracts else None
        if less is not None and f != "LinearActivation":
            raise ValueError(f"intervention has a projection with a bias beside the activation {f}")
        p = intervention.dropout.p if hasattr(intervention, "dropout") else 0.0
        made = cls(R.shape[1], len(R), variant, _PYREFT_ACTIVATIONS[f], p, device=R.device, dtype=R.dtype)
        made.set_rotation(R)
        bias = source.bias if known.source else source
        made.bias.copy_(bias if less is None else bias - less)
        if known.source:
            made.weight.copy_(source.weight)
        return made.train(intervention.training)

    def reset_parameters(self) -> None:
        """A random rotation, a source like a new ``nn.Linear``; without a source a bias from 0 to 1."""
        for matrix in (self.rotate, self.weight):
            if matrix is not None:
                nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))
        if self.bias is not None and self.weight is not None:
            nn.init.uniform_(self.bias, -1 / math.sqrt(self.hidden), 1 / math.sqrt(self.hidden))
        elif self.bias is not None:
            nn.init.uniform_(self.bias)
        if self.variant in ORTHONORMAL and not self.rotate.is_meta:
            self.set_rotation(nn.init.orthogonal_(torch.empty_like(self.rotate)))

    @torch.no_grad()
    def set_rotation(self, R: Tensor) -> None:
        """Makes R (r, H) the rotation. pyreft saves it transposed, as ``rotate_layer`` (H, r)."""
        if R.shape != self.rotate.shape:
            raise ValueError(f"R has shape {tuple(R.shape)}, expected (r, H) = {tuple(self.rotate.shape)}")
        R = R.to(self.rotate)
        self.rotate.copy_(free_numbers(R) if self.variant in ORTHONORMAL else R)

    def rotation(self) -> Tensor:
        """R (r, H)."""
        return self._rotation.of(self.rotate) if self.variant in ORTHONORMAL else self.rotate

    def forward(self, h: Tensor, positions: Tensor) -> Tensor:
        """h (B, T, H) or (T, H), edited at ``positions`` (B, P) or (P)."""
        return reft(
            h, self.rotation(), self.weight, self.bias, positions=positions, variant=self.variant,
            activation=self.activation, dropout_p=self.dropout, training=self.training,
        )  # fmt: skip

    def extra_repr(self) -> str:
        """The arguments, as ``print`` shows them."""
        return (
            f"hidden={self.hidden}, rank={self.rank}, variant={self.variant}, activation={self.activation}, "
            f"dropout={self.dropout}, bias={self.bias is not None}"
        )


def reft_positions(
    spec: str,
    lengths: Tensor,
    *,
    padding: str = "right",
    width: int | None = None,
    overlap: str = "half",
    split: bool = False,
    past: int = 0,
    columns: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Where ``reft`` edits sequences of a padded batch, or of one step of decoding.

    Args:
        spec: "f3+l2", "f3" or "l2": how many of a sequence's first and last tokens.
        lengths: int64 (B), tokens of each sequence, padding not counted. In decoding those of the prompts, which training
            edited: generated tokens then are none of the listed.
        padding: the side that it is on. width: columns of the padded batch, which a left side needs.
        overlap: of a sequence that is too short for both. "half": as pyreft, at most half of it (rounded down) from either
            end. "last": as AdapterHub's ``adapters``, what the last tokens do not take. It also edits padding next to a
            sequence that is shorter than a count; here padding is left alone.
        split: two tensors, of the first and of the last tokens, for parameters of their own (``adapters``' default).
        past: columns that a cache holds already. columns: of this call, None for all that are left of ``width``, or no end.

    Returns:
        int64 (B, F + L) on the device of ``lengths``, in the columns of the call; -1 where a sequence has fewer. With
        ``split`` (B, F) and (B, L).

    Raises ValueError and TypeError, naming the argument that does not fit.
    """
    found = re.fullmatch(r"(?:f(\d+))?\+?(?:l(\d+))?", spec) if isinstance(spec, str) else None
    if found is None or not any(found.groups()) or ("+" in spec) != all(found.groups()):
        raise ValueError(f"spec is {spec!r}, expected a form like 'f3+l2', 'f3' or 'l2'")
    check_tensor("lengths", lengths, dtypes=(torch.int64,))
    if lengths.dim() != 1:
        raise ValueError(f"lengths has shape {tuple(lengths.shape)}, expected (B,)")
    if padding not in ("left", "right") or (padding == "left" and width is None):
        raise ValueError(f"padding is {padding!r}, expected 'right', or 'left' with a width")
    if overlap not in ("half", "last"):
        raise ValueError(f"overlap is {overlap!r}, expected 'half' or 'last'")
    F, L = (int(n or 0) for n in found.groups())
    n = lengths[:, None]
    first, last = (torch.arange(count, device=lengths.device).expand(len(lengths), count) for count in (F, L))
    # ``last`` counts from the end: 0 is the last token but L - 1.
    last = n - L + last
    if overlap == "half":
        keep_first, keep_last = first < n // 2, last >= n - n // 2
    else:
        keep_first, keep_last = first < n - L, last >= 0
    start = width - n if padding == "left" else 0
    end = columns if columns is not None else (math.inf if width is None else width - past)

    def placed(tokens: Tensor, keep: Tensor) -> Tensor:
        at = tokens + start - past
        return torch.where(keep & (at >= 0) & (at < end), at, -1)

    parts = placed(first, keep_first), placed(last, keep_last)
    return parts if split else torch.cat(parts, 1)
