"""RandLoRA on a linear layer, as HF PEFT computes it: a sum of random branches, frozen and scaled, of the rank of W.

    y = x W^T + s B (A drop(x)) + bias,    A[k, b] = lambda[k, b] * randlora_A[k] * gamma[b]

with a row of A, and a column of B, for each of the r ranks k and bases b. randlora_A (r, 1, m) and randlora_B (n, bases, r)
are random, frozen, shared by all layers and made for the largest of them; lambda (r, bases) and gamma (bases, m) train. m is the
smaller of K and N: where that is N, the layer has B^T A^T, so A is the factor with the output's size.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ...autograd.saved import first_only
from ...bases.base import Base
from ...checks import accumulate_dtype
from ...ops.dropout_mask import acting
from .. import tuner
from ..linear import Branch, Linear, frozen_weight, run
from ..look import Look, NotCovered
from ..registry import Held, Method, register


class ScaledBasesFunction(torch.autograd.Function):
    """lambda[k, b] * A[k, 0] * gamma[b] of A (r, 1, m), which keeps nothing else."""

    @staticmethod
    def forward(ctx, A, strength, gamma):
        ctx.save_for_backward(A, strength, gamma)
        return (A * gamma).mul_(strength[..., None])

    @staticmethod
    @first_only("randlora_linear")
    def backward(ctx, grad):
        A, strength, gamma = ctx.saved_tensors
        by_base = grad * A
        return None, torch.einsum("kbm,bm->kb", by_base, gamma), torch.einsum("kbm,kb->bm", by_base, strength)


def _branch(K: int, N: int, tensors: tuple[Tensor, ...], *options) -> Branch:
    A, B, strength, gamma = (t.to(accumulate_dtype(t.dtype)) for t in tensors)
    small = ScaledBasesFunction.apply(A[..., : min(K, N)], strength, gamma).flatten(0, 1)
    # In memory, a column for each basis and rank: the library flattens both this way, so ranks of A do not meet their own.
    large = B[: max(K, N), : strength.shape[1]].flatten(1)
    return Branch(small, large, *options) if K <= N else Branch(large.t(), small.t(), *options)


def randlora_linear(
    x: Tensor, weight: Tensor | Base, randlora_A: Tensor, randlora_B: Tensor, randlora_lambda: Tensor, randlora_gamma: Tensor, *,
    bias: Tensor | None = None, scaling: float | Tensor = 1.0, dropout_p: float = 0.0, training: bool = False,
    seed: int | Tensor | None = None,
) -> Tensor:  # fmt: skip
    """A frozen linear layer with RandLoRA: the equation at the top of peftkern/methods/derived/randlora.py.

    Args:
        x: (..., K). weight: (N, K). randlora_A: (r, 1, at least m), randlora_B: (at least n, at least bases, r), frozen.
            randlora_lambda: (r, bases). randlora_gamma: (bases, m). m, n: the smaller and the larger of K and N. bias,
            scaling, dropout_p, training, seed: as in ``lora_linear``.

    Returns (..., N). Raises as ``lora_linear`` does.
    """
    weight = frozen_weight(weight, bias)
    N, K = weight.shape
    m, n = "NK" if N <= K else "KN"
    frozen_weight(
        weight, bias, randlora_lambda=(randlora_lambda, "r bases"), randlora_gamma=(randlora_gamma, f"bases {m}"),
        randlora_A=(randlora_A, f"r 1 {m}+"), randlora_B=(randlora_B, f"{n}+ bases+ r"),
    )  # fmt: skip
    tensors = randlora_A, randlora_B, randlora_lambda, randlora_gamma
    branch = _branch(K, N, tensors, scaling, acting(dropout_p, training))._replace(seed=seed)
    return run(Linear(weight, bias).add(branch), x)


def held(look: Look, name: str, shape: tuple[int, int]) -> Held:
    """What ``randlora.Linear`` holds of an adapter."""
    (N, K), r, bases = shape, look.item("r", name), look.value("num_bases")
    shapes = {"randlora_A": (r, 1, None), "randlora_B": (None, None, r)}
    own = {"randlora_lambda": (r, bases), "randlora_gamma": (bases, min(K, N))}
    A, B, *trained = tuner.tensors(look, name, shapes | own)
    if A.shape[2] < min(K, N) or B.shape[0] < max(K, N) or B.shape[1] < bases:
        raise NotCovered(f"the bases of {name!r} are too small for a weight of {N} x {K}")
    scaling, p = tuner.number(look.item("scaling", name), name), tuner.drop_probability(look, "randlora_dropout", name)
    return Held(name, RANDLORA, (A, B, *trained), (scaling,), p, r * bases)


def apply(y: Linear, adapter: Held) -> Linear:
    """The layer with this adapter."""
    N, K = y.weight.shape
    return y.add(_branch(K, N, adapter.tensors, *adapter.numbers, adapter.dropout_p))


def examples(in_features: int, out_features: int) -> Mapping[str, nn.Module]:
    """PEFT models of one layer."""
    import peft
    from transformers.pytorch_utils import Conv1D

    def config(**options):
        return peft.RandLoraConfig(
            **{"target_modules": ["0"], "r": 4, "randlora_alpha": 6, "init_weights": False, **options}
        )

    K, N = in_features, out_features
    return {
        "linear": tuner.layer(nn.Linear(K, N), config()),
        "a larger output, no bias": tuner.layer(nn.Linear(K, N, bias=False), config(r=3)),
        "sparse": tuner.layer(nn.Linear(K, N), config(sparse=True)),
        "very sparse": tuner.layer(nn.Linear(K, N), config(very_sparse=True)),
        "Conv1D": tuner.layer(Conv1D(N, K), config(fan_in_fan_out=True)),
        "two adapters": tuner.layer(nn.Linear(K, N), config(), config(randlora_alpha=2)),
    }


RANDLORA = register(
    Method(
        name="RandLoRA",
        taxonomy="reparameterised",
        family="L",
        layer="peft.tuners.randlora.layer.Linear",
        also=("peft.tuners.randlora.bnb.Linear8bitLt", "peft.tuners.randlora.bnb.Linear4bit"),
        adapters="randlora_lambda",
        held=held,
        apply=apply,
        function=randlora_linear,
        examples=examples,
        build=tuner.builder("RandLoraConfig"),
        rank=32,
        op="lora_linear",
        saves="x if K is at most N, else (M, R) in fp32, and A; R the smaller of N and K",
        merges="W + s B A",
        peft_type="RANDLORA",
        keeps_dtype=True,
        makes=True,
        widens=True,
        tested={"peft": ((0, 21), (0, 21))},
    )
)
