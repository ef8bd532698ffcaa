"""Random bottleneck_adapter problems: every activation, any subset of the options, a residual of another width, any layout.

Where an activation has a kink, t is near zero in one order of sums and beyond it in another, and a gradient jumps. So the
operands of t are then whole multiples of a power of two with few bits, of which every order gives the same t.
"""

from __future__ import annotations

import math
import random
from dataclasses import asdict, dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from ..activations import ACTIVATIONS
from ..autograd.residual.bottleneck_adapter import bottleneck_adapter
from ..ops.dropout_mask import dropout_mask_ref
from .equations import mm
from .problems import DROPOUT_SEED, LAYOUTS, laid_out

# Optional tensors: the letter of their size; the gate is one of rows, the scaling one number.
OPTIONS = {"down_bias": "R", "up_bias": "N", "gate": "M", "out_scale": "N", "scaling": "1", "residual": "MN"}
KINKED = ("relu", "leaky_relu")
_GRID = 8.0  # values of a kinked problem are multiples of 1 / _GRID times a power of two

_VALUES = {
    "identity": lambda t: t, "relu": F.relu, "leaky_relu": F.leaky_relu, "gelu": F.gelu, "silu": F.silu,
    "gelu_tanh": lambda t: F.gelu(t, approximate="tanh"), "tanh": torch.tanh, "sigmoid": torch.sigmoid,
}  # fmt: skip


@dataclass(frozen=True)
class BottleneckProblem:
    """Sizes, dtypes and options of one call; ``seed`` makes its values. N is K unless there is a residual.

    ``factor``: the scaling where none trains. ``layout``: of h; ``matrix_layout``: of down and up. ``frozen``: what does
    not require grad.
    """

    seed: int
    M: int
    K: int
    N: int
    R: int
    dtype: torch.dtype
    adapter_dtype: torch.dtype
    activation: str = "relu"
    factor: float = 1.0
    dropout_p: float = 0.0
    dropout_on: str = "output"
    options: tuple[str, ...] = ()
    vector_dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    matrix_layout: str = "contiguous"
    frozen: frozenset[str] = field(default_factory=frozenset)

    def __str__(self) -> str:
        parts = asdict(self)
        parts["frozen"] = ",".join(sorted(self.frozen)) or "-"
        parts["options"] = ",".join(self.options) or "-"
        return " ".join(f"{k}={str(v).removeprefix('torch.')}" for k, v in parts.items())

    def tensors(self) -> dict[str, Tensor]:
        """h, down, up, dy and the optional tensors, on CPU, without grad."""
        gen = torch.Generator().manual_seed(self.seed)
        M, K, N, R = self.M, self.K, self.N, self.R

        def normal(*shape: int, dtype: torch.dtype, scale: float = 1.0, coarse: bool = False) -> Tensor:
            values = torch.randn(*shape, generator=gen)
            if coarse and self.activation in KINKED:
                values = (values * _GRID).round() / _GRID
                scale = 2.0 ** math.floor(math.log2(scale))
            return (values * scale).to(dtype)

        def matrix(rows: int, columns: int, **options) -> Tensor:
            scale = 1 / math.sqrt(max(columns, 1))
            return laid_out(normal(rows, columns, dtype=self.adapter_dtype, scale=scale, **options), self.matrix_layout)

        out = {
            "h": laid_out(normal(M, K, dtype=self.dtype, coarse=True), self.layout),
            "down": matrix(R, K, coarse=True),
            "up": matrix(N, R),
        }
        lead = out["h"].shape[:-1]
        out["dy"] = normal(*lead, N, dtype=self.dtype)
        shapes = {"R": (R,), "N": (N,), "M": (*lead, 1), "1": (1,), "MN": (*lead, N)}
        for name in self.options:
            dtype = self.dtype if name == "residual" else self.vector_dtype
            out[name] = normal(*shapes[OPTIONS[name]], dtype=dtype, coarse=name == "down_bias")
        return out

    def ours(self, t: dict[str, Tensor]) -> Tensor:
        """y from peftkern."""
        options = {"scaling": self.factor} | {k: v for k, v in t.items() if k not in ("h", "down", "up")}
        return bottleneck_adapter(
            t["h"], t["down"], t["up"], **options, activation=self.activation, dropout_p=self.dropout_p,
            dropout_on=self.dropout_on, training=True, seed=DROPOUT_SEED,
        )  # fmt: skip

    def eager(self, t: dict[str, Tensor]) -> Tensor:
        """y in the order of ``adapters``: two linear layers in the matrices' dtype, scaling, dropout, gate, residual."""
        h, dtype = t["h"].flatten(0, -2), t["down"].dtype
        p_in, p_out = self._shares()
        z = _VALUES[self.activation](_linear(self._drop(h.to(dtype), p_in), t["down"], t.get("down_bias")))
        o = _linear(z, t["up"], t.get("up_bias")) * t.get("scaling", self.factor)
        if "out_scale" in t:
            o = o * t["out_scale"]
        o = self._drop(o, p_out)
        if "gate" in t:
            o = o * t["gate"].reshape(-1, 1)
        return (t.get("residual", t["h"]).flatten(0, -2) + o).to(h.dtype).unflatten(0, t["h"].shape[:-1])

    def oracle(self, t: dict[str, Tensor], absolute: bool = False) -> Tensor:
        """y as the equation says, in the dtype of ``t``."""
        h, (p_in, p_out), M = t["h"].flatten(0, -2), self._shares(), self.M
        pre = torch.einsum("mk,rk->mr", self._drop(h, p_in), t["down"]) + t.get("down_bias", 0.0)
        z = _bound(pre, self.activation) if absolute else _VALUES[self.activation](pre)
        factor = t.get("scaling", abs(self.factor) if absolute else self.factor)
        o = factor * t.get("out_scale", 1.0) * (torch.einsum("mr,nr->mn", z, t["up"]) + t.get("up_bias", 0.0))
        gate = t["gate"].reshape(M, 1) if "gate" in t else 1.0
        return (t.get("residual", t["h"]).flatten(0, -2) + gate * self._drop(o, p_out)).unflatten(0, t["h"].shape[:-1])

    def _shares(self) -> tuple[float, float]:
        return (self.dropout_p, 0.0) if self.dropout_on == "input" else (0.0, self.dropout_p)

    def _drop(self, x: Tensor, p: float) -> Tensor:
        if not p:
            return x
        keep = dropout_mask_ref(torch.tensor([DROPOUT_SEED], device=x.device), *x.shape, p)
        return torch.where(keep, x / (1 - p), torch.zeros((), dtype=x.dtype, device=x.device))


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # As F.linear, which adds the bias before it rounds.
    if bias is None or weight.dtype == torch.float32:
        y = mm(x, weight)
        return y if bias is None else y + bias
    return (x.float() @ weight.float().T + bias.float()).to(x.dtype)


def _bound(t: Tensor, activation: str) -> Tensor:
    # At least |f(t)|, with a slope of about |f'| at least: how far an error of t can carry.
    return 0.5 + 0.25 * t if activation == "sigmoid" else t


def random_bottleneck_problem(
    seed: int, dtype: torch.dtype, *, max_M: int = 1500, max_KN: int = 2000, max_R: int = 300
) -> BottleneckProblem:
    """The problem number ``seed``."""
    rng = random.Random(seed)

    def size(high: int) -> int:
        return min(high, round(math.exp(rng.uniform(0.0, math.log(high + 1)))))

    M = 0 if rng.random() < 0.03 else size(max_M)
    K, R, activation = size(max_KN), size(max_R), rng.choice(tuple(ACTIVATIONS))
    options = tuple(name for name in OPTIONS if rng.random() < 0.5)
    dropout_on = rng.choice(("output", "input"))
    # Of what is dropped before a kink the scale must be a power of two.
    shares = (0.0, 0.5) if activation in KINKED and dropout_on == "input" else (0.0, 0.0, 0.1, 0.5, 0.9)
    trainable = ("h", "down", "up", *options)
    return BottleneckProblem(
        seed=seed, M=M, K=K, N=size(max_KN) if "residual" in options else K, R=R, dtype=dtype,
        adapter_dtype=rng.choice((torch.float32, dtype)), activation=activation,
        factor=rng.choice((1.0, 4.0, 0.37, -1.5, 0.0)), dropout_p=rng.choice(shares), dropout_on=dropout_on,
        options=options, vector_dtype=rng.choice((torch.float32, dtype)), layout=rng.choice(LAYOUTS),
        matrix_layout=rng.choice(LAYOUTS[:3]), frozen=frozenset(n for n in trainable if rng.random() < 0.15),
    )  # fmt: skip
