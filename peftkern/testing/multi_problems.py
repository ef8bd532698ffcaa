"""Random multi_lora_linear problems: ids in any order, adapters without rows, mixed ranks, list or bank."""

from __future__ import annotations

import math
import random
from dataclasses import asdict, dataclass, field, replace

import torch
from torch import Tensor

from ..activations import ACTIVATIONS
from ..autograd.multi_lora_linear import multi_lora_linear, sgmv
from ..many.adapter import Adapter
from ..many.bank import AdapterBank
from ..ops.dropout_mask import dropout_mask_ref
from . import equations
from .bases import QUANTISED, dequantised, drawn
from .problems import DROPOUT_SEED, LAYOUTS, laid_out, vectors

# How rows choose their adapters.
MIXES = ("uniform", "sorted", "one", "skewed", "base")


@dataclass(frozen=True)
class MultiLoRALinearProblem:
    """Sizes, ranks, dtypes and options of one call; ``seed`` makes its values and ids. ``frozen``: what has no grad.

    ``mix``: see MIXES (``one``: all rows take one adapter; ``base``: none takes any). ``base_share``: of rows that take
    the base alone. ``bank``: the adapters lie in an AdapterBank. ``branch``: sgmv instead, without W. ``vectors``: names
    of the coefficients that each adapter has, and its biases; none for adapters beyond its length. ``activations``:
    likewise, identity beyond. ``base``: dense, or one of QUANTISED (peftkern/testing/bases.py).
    """

    seed: int
    M: int
    K: int
    N: int
    ranks: tuple[int, ...]
    dtype: torch.dtype
    adapter_dtype: torch.dtype
    scalings: tuple[float, ...]
    dropout_p: tuple[float, ...]
    mix: str = "uniform"
    base_share: float = 0.0
    bias: bool = False
    layout: str = "contiguous"
    zero_weight: bool = False
    bank: bool = False
    branch: bool = False
    frozen: frozenset[str] = field(default_factory=frozenset)
    vectors: tuple[tuple[str, ...], ...] = ()
    activations: tuple[str, ...] = ()
    base: str = "dense"

    def __str__(self) -> str:
        parts = asdict(self) | {"frozen": ",".join(sorted(self.frozen)) or "-"}
        parts["vectors"] = "/".join("+".join(names) for names in self.vectors) or "-"
        parts["activations"] = "/".join(self.activations) or "-"
        return " ".join(f"{k}={str(v).removeprefix('torch.')}" for k, v in parts.items())

    def ids(self) -> Tensor:
        """One id per row."""
        gen, count = torch.Generator().manual_seed(self.seed + 1), len(self.ranks)
        ids = torch.randint(count, (self.M,), generator=gen)
        if self.mix == "one":
            ids[:] = self.seed % count
        elif self.mix == "skewed":
            ids = torch.where(torch.rand(self.M, generator=gen) < 0.9, 0, ids)
        ids[torch.rand(self.M, generator=gen) < self.base_share] = -1
        if self.mix == "base":
            ids[:] = -1
        return ids.sort().values if self.mix == "sorted" else ids

    def tensors(self) -> dict[str, Tensor]:
        """x, weight, dy, bias if there is one, A0, B0, A1, ... and vectors, base_out_scale2, on CPU, without grad."""
        gen = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int, scale: float = 1.0, dtype: torch.dtype = self.dtype) -> Tensor:
            return (torch.randn(*shape, generator=gen) * scale).to(dtype)

        M, K, N = self.M, self.K, self.N
        out = {"x": laid_out(normal(M, K), self.layout)}
        if not self.branch:
            out["weight"] = normal(N, K, scale=0.0 if self.zero_weight else 1 / math.sqrt(K))
            if self.base in QUANTISED:
                out["weight"] = dequantised(drawn(self.base, N, K, self.seed), N, K)
            if self.bias:
                out["bias"] = normal(N)
        out["dy"] = normal(*out["x"].shape[:-1], N)
        for i, R in enumerate(self.ranks):
            out[f"A{i}"] = normal(R, K, scale=1 / math.sqrt(K), dtype=self.adapter_dtype)
            out[f"B{i}"] = normal(N, R, scale=1 / math.sqrt(R), dtype=self.adapter_dtype)
        axes = vectors() | {"rank_bias": "R"}
        for i, names in enumerate(self.vectors[: len(self.ranks)]):
            for name in names:
                size = {"R": self.ranks[i], "K": K, "N": N}[axes[name]]
                out[f"{name}{i}"] = normal(size, dtype=torch.float32)
        return out

    def own(self, t: dict[str, Tensor], i: int) -> dict[str, Tensor]:
        """The vectors of adapter ``i`` by name."""
        names = self.vectors[i] if i < len(self.vectors) else ()
        return {name: t[f"{name}{i}"] for name in names}

    def activation(self, i: int) -> str:
        """Of adapter ``i``."""
        return self.activations[i] if 0 <= i < len(self.activations) else "identity"

    def ours(self, t: dict[str, Tensor]) -> Tensor:
        """y from ``multi_lora_linear`` or ``sgmv``."""
        device = t["x"].device
        ids, adapters = self.ids().to(device), []
        for i, s in enumerate(self.scalings):
            matrices, own = (t[f"A{i}"], t[f"B{i}"], s), {**self.own(t, i), "activation": self.activation(i)}
            adapters.append(Adapter(*matrices, **own) if own != {"activation": "identity"} else matrices)
        if self.bank:
            bank = AdapterBank(
                self.K, self.N, max_adapters=len(adapters), max_rank=max(self.ranks), dtype=self.adapter_dtype,
                device=device,
            )  # fmt: skip
            added = (
                bank.add(str(i), t[f"A{i}"], t[f"B{i}"], s, **self.own(t, i), activation=self.activation(i))
                for i, s in enumerate(self.scalings)
            )
            numbers = torch.tensor([*added, -1], device=device)
            adapters, ids = bank, numbers[ids]
        ids = ids.reshape(t["x"].shape[:-1])
        if self.branch:
            return sgmv(t["x"], adapters, ids)
        quantised = self.base in QUANTISED
        weight = drawn(self.base, self.N, self.K, self.seed, device) if quantised else t["weight"]
        return multi_lora_linear(
            t["x"], weight, adapters, ids, bias=t.get("bias"), dropout_p=self.dropout_p, training=True,
            seed=DROPOUT_SEED,
        )  # fmt: skip

    def eager(self, t: dict[str, Tensor]) -> Tensor:
        """PEFT's order: the base for all rows, then for each adapter its rows' branch, added in their dtype."""
        t = t | ({"weight": t["weight"].to(self.dtype)} if self.base in QUANTISED else {})
        return self._each(t, equations.eager, self.scalings)

    def oracle(self, t: dict[str, Tensor], absolute: bool = False) -> Tensor:
        """y as the equation says, in the dtype of ``t``."""
        return self._each(t, equations.oracle, [abs(s) if absolute else s for s in self.scalings])

    def _each(self, t: dict[str, Tensor], equation, scalings) -> Tensor:
        # Every row through the single-adapter equation of its adapter; base rows through that of rank 0.
        x = t["x"].flatten(0, -2)
        ids = self.ids().to(x.device)
        seed = torch.tensor([DROPOUT_SEED], device=x.device)
        weight = t["weight"] if "weight" in t else x.new_zeros(self.N, self.K)
        y = x.new_zeros(self.M, self.N)
        for i in range(-1, len(self.ranks)):
            rows = (ids == i).nonzero()[:, 0]
            if i >= 0:
                A, B, s, p = t[f"A{i}"], t[f"B{i}"], scalings[i], self.dropout_p[i]
            else:
                A, B, s, p = t["A0"][:0].detach(), t["B0"][:, :0].detach(), 1.0, 0.0
            keep = dropout_mask_ref(seed, self.M, self.K, p)[rows] if p else None
            single = {"x": x[rows], "weight": weight, "lora_A": A, "lora_B": B}
            if "bias" in t:
                single["bias"] = t["bias"]
            single |= self.own(t, i) if i >= 0 else {}
            y = y.index_put((rows,), equation(single, s, keep, p, self.activation(i)))
        return y.unflatten(0, t["x"].shape[:-1])


def random_multi_problem(
    seed: int, dtype: torch.dtype, *, max_M: int = 2048, max_KN: int = 3000, max_R: int = 512, max_adapters: int = 12,
    bottlenecks: bool = True,
) -> MultiLoRALinearProblem:  # fmt: skip
    """The problem number ``seed``; without ``bottlenecks`` no adapter has an activation."""
    rng = random.Random(seed)

    def size(low: int, high: int) -> int:
        return min(high, round(math.exp(rng.uniform(math.log(low), math.log(high + 1)))))

    count = size(1, max_adapters)
    M, bank, branch = 0 if rng.random() < 0.03 else size(1, max_M), rng.random() < 0.3, rng.random() < 0.25
    drops = not branch and rng.random() < 0.4
    names = ["x", "bias", *(f"{m}{i}" for i in range(count) for m in "AB")]
    frozen = {n for n in names if rng.random() < 0.15} | (set(names[2:]) if bank else set())
    problem = MultiLoRALinearProblem(
        seed=seed, M=M, K=size(1, max_KN), N=size(1, max_KN),
        ranks=tuple(size(1, max_R) for _ in range(count)),
        dtype=dtype,
        adapter_dtype=rng.choice((torch.float32, dtype)),
        scalings=tuple(rng.choice((1.0, 2.0, 0.37, -1.5)) for _ in range(count)),
        dropout_p=tuple(rng.choice((0.0, 0.1, 0.5)) if drops else 0.0 for _ in range(count)),
        mix=rng.choice(MIXES),
        base_share=rng.choice((0.0, 0.2, 0.5)),
        bias=rng.random() < 0.5,
        layout=rng.choice(LAYOUTS),
        zero_weight=rng.random() < 0.15,
        bank=bank,
        branch=branch,
        frozen=frozenset(frozen),
    )  # fmt: skip
    if rng.random() < 0.6:
        return problem
    # From here on vectors, so that problems without them are what they have always been.
    usable = [n for n in vectors() if not branch or n in ("rank_scale", "delta_in_scale", "delta_out_scale")]
    chosen = tuple(tuple(n for n in usable if rng.random() < 0.4) for _ in range(count))
    each = [f"{n}{i}" for i, names in enumerate(chosen) for n in names]
    frozen |= {n for n in each if bank or rng.random() < 0.2}
    problem = replace(problem, vectors=chosen, frozen=frozenset(frozen))
    if not bottlenecks or rng.random() < 0.6:
        return problem
    bent = [i for i in range(count) if rng.random() < 0.6]
    chosen = tuple((*names, "rank_bias") if i in bent else names for i, names in enumerate(chosen))
    frozen |= {f"rank_bias{i}" for i in bent if bank or rng.random() < 0.2}
    activations = tuple(rng.choice(list(ACTIVATIONS)) for _ in range(count))
    return replace(problem, vectors=chosen, frozen=frozenset(frozen), activations=activations)
