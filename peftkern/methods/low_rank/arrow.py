"""Arrow (Ostapenko et al. 2024) on a linear layer, as HF PEFT computes it: each token takes the adapters that it is like.

    y_t = x_t W^T + sum over adapters a of c[t, a] s[a] * B[a] (A[a] x_t) + bias
    c[t] = softmax over the top_k largest |x_t P^T| / temperature, zero for all others

P has a prototype of each adapter, which PEFT makes at the first call. The adapters are one branch, A and B stacked, whose
ranks have a scale of their own for each token; PEFT computes every adapter's output for every token.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from .. import tuner
from ..linear import Branch, Linear
from ..look import Look, NotCovered
from ..registry import Held, Method, loaded, register
from . import lora


def routed(x: Tensor, prototypes: Tensor, scalings: tuple[float, ...], top_k: int, temperature: float) -> Tensor:
    """s * c (..., adapters) of x (..., K)."""
    likeness = (x @ prototypes.T).abs()
    best, which = likeness.topk(top_k, dim=-1)
    weights = torch.softmax(best / temperature, -1)
    c = weights.new_zeros(likeness.shape).scatter(-1, which, weights)
    return c * c.new_tensor(scalings)


def held(look: Look, name: str, shape: tuple[int, int]) -> Held:
    """What ``lora.Linear`` holds of an Arrow router: the adapters between which it chooses, and their prototypes."""
    arrow = look.part("lora_arrow").part(name)
    arrow.require(loaded("peft.tuners.lora.arrow.ArrowLoraLinearLayer"), "lora_arrow")
    if arrow.value("use_gks") and (not arrow.value("gks_done") or arrow.value("gks_added_adapter_names")):
        raise NotCovered(f"the next call of {name!r} subtracts general knowledge from its adapters")
    if not arrow.value("_protos_ready"):
        raise NotCovered(f"{name!r} has no prototypes yet: the next call makes them")
    if tuner.drop_probability(look, "lora_dropout", name):
        raise NotCovered(f"the dropout of {name!r} acts on its output")
    experts = [lora.read(look, of, shape, ARROW) for of in arrow.value("task_adapter_names")]
    prototypes = arrow.tensor("prototypes")
    if any(isinstance(e.numbers[0], Tensor) for e in experts) or len({e.rank for e in experts}) > 1:
        raise NotCovered(f"the adapters of {name!r} differ in rank, or their scaling is a tensor")
    if not arrow.value("cast_input_dtype_enabled") or len({e.tensors[0].dtype for e in experts}) > 1:
        raise NotCovered(f"the adapters of {name!r} differ in dtype")
    numbers = tuple(e.numbers[0] for e in experts), arrow.value("top_k"), arrow.value("temperature")
    tensors = *(e.tensors[0] for e in experts), *(e.tensors[1] for e in experts), prototypes
    return Held(name, ARROW, tensors, numbers, 0.0, sum(e.rank for e in experts))


def apply(y: Linear, adapter: Held) -> Linear:
    """The layer with this adapter."""
    *matrices, prototypes = adapter.tensors
    E = len(matrices) // 2
    scalings, top_k, temperature = adapter.numbers
    route = partial(routed, prototypes=prototypes, scalings=scalings, top_k=top_k, temperature=temperature)
    return y.add(Branch(torch.cat(matrices[:E]), torch.cat(matrices[E:], 1), route=route))


def examples(in_features: int, out_features: int) -> Mapping[str, nn.Module]:
    """PEFT models of one layer, whose prototypes have been made."""
    K, N = in_features, out_features
    return {
        "two of three": _model(nn.Linear(K, N), 3, top_k=2, router_temperature=0.7),
        "all, no bias": _model(nn.Linear(K, N, bias=False), 2, top_k=2),
    }


def _model(linear: nn.Linear, adapters: int, R: int = 4, **options) -> nn.Module:
    from peft.tuners.lora.config import ArrowConfig

    made = tuner.layer(linear, *[lora.config(r=R, lora_alpha=3 + i) for i in range(adapters)])
    settings = ArrowConfig(**options)
    settings.task_adapter_names, settings.gks_adapter_names = list(made.peft_config), []
    made.add_adapter("arrow_router", lora.config(r=R, arrow_config=settings))
    made.base_model.set_adapter("arrow_router")
    for name, p in made.named_parameters():
        p.requires_grad_("lora_" in name and "arrow_router" not in name)
    made(linear.weight.new_ones(1, linear.in_features))
    return made


def build(linear: nn.Linear, R: int) -> nn.Module:
    """A choice between three adapters."""
    return _model(linear, 3, R, top_k=2)


ARROW = register(
    Method(
        name="Arrow",
        taxonomy="reparameterised",
        family="L",
        layer="peft.tuners.lora.variants.ArrowLinearVariant",
        variant=True,
        held=held,
        apply=apply,
        examples=examples,
        build=build,
        op="lora_linear",
        routes=True,
        saves="x, and (M, R) of all adapters twice",
        merges="not at all: each token has its own",
        peft_type="LORA",
        tested={"peft": ((0, 21), (0, 21))},
    )
)
