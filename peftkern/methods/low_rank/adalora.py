"""AdaLoRA (Zhang et al. 2023) on a linear layer, as HF PEFT computes it.

    y = x W^T + (alpha / (n + 1e-5)) * B (E * (A drop(x))) + bias

E (R) are the singular values, some of them zero once the budget is spent. n is the rank at the start, a tensor, which the
host never reads.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ...bases.base import Base
from ...ops.dropout_mask import acting
from .. import lora_stored, tuner
from ..linear import Branch, Linear, frozen_weight, run
from ..look import Look
from ..registry import Held, Method, register
from ..stored import Settings, Stored, Unfit, check_number, check_rank


def adalora_linear(
    x: Tensor, weight: Tensor | Base, lora_A: Tensor, lora_B: Tensor, lora_E: Tensor, *, bias: Tensor | None = None,
    scaling: float | Tensor = 1.0, dropout_p: float = 0.0, training: bool = False, seed: int | Tensor | None = None,
) -> Tensor:  # fmt: skip
    """A frozen linear layer with AdaLoRA: the equation at the top of peftkern/methods/adalora.py.

    Args:
        x: (..., K). weight: (N, K). lora_A: (R, K). lora_B: (N, R). lora_E: (R) or (R, 1). scaling: the whole factor,
            which HF PEFT computes as alpha / (ranknum + 1e-5). bias, dropout_p, training, seed: as in ``lora_linear``.

    Returns (..., N). Raises as ``lora_linear`` does.
    """
    weight = frozen_weight(weight, bias, lora_A=(lora_A, "R K"), lora_B=(lora_B, "N R"), lora_E=(lora_E, "R 1|R"))
    p = acting(dropout_p, training)
    return run(Linear(weight, bias).add(Branch(lora_A, lora_B, scaling, p, d=lora_E.flatten(), seed=seed)), x)


def held(look: Look, name: str, shape: tuple[int, int]) -> Held:
    """What ``adalora.SVDLinear`` holds of an adapter."""
    A, B, E = tuner.tensors(look, name, {"lora_A": (None, shape[1]), "lora_B": (shape[0], None), "lora_E": (None, 1)})
    (n,) = tuner.tensors(look, name, {"ranknum": (1,)})
    scaling = tuner.number(look.item("scaling", name), name)
    p = tuner.drop_probability(look, "lora_dropout", name)
    return Held(name, ADALORA, (A, B, E, n), (scaling,), p, A.shape[0])


def apply(y: Linear, adapter: Held) -> Linear:
    """The layer with this adapter."""
    (A, B, E, n), (alpha,) = adapter.tensors, adapter.numbers
    return y.add(Branch(A, B, alpha / (n + 1e-5), adapter.dropout_p, d=E.flatten()))


def _check(settings: Settings) -> None:
    lora_stored.check_init(settings)
    check_rank(settings, "init_r")
    check_number(settings, "lora_alpha")
    patterns = settings["rank_pattern"] or {}
    if not isinstance(patterns, dict):
        raise Unfit("rank_pattern", f"is {patterns!r}, expected an object")
    for name, kept in patterns.items():
        if not isinstance(kept, list) or not all(isinstance(one, bool) for one in kept):
            raise Unfit("rank_pattern", f"has the entry {name!r}: {kept!r}, expected which of the ranks are kept")


def _rank(settings: Settings, module: str) -> int:
    # The pattern says of each rank whether it is kept; the file has those alone.
    kept = (settings["rank_pattern"] or {}).get(f"{module}.lora_E")
    return settings["init_r"] if kept is None else sum(kept)


def _take(settings: Settings, module: str, tensors: Mapping[str, Tensor]) -> tuple[tuple, tuple]:
    A, B, E = (tensors[name] for name in ("lora_A", "lora_B", "lora_E"))
    alpha = settings["lora_alpha"] if settings["lora_alpha"] > 0 else _rank(settings, module)
    # Whatever was pruned, n stays the rank at the start.
    return (A, B, E, E.new_full((1,), settings["init_r"])), (float(alpha),)


STORED = Stored(
    names=("lora_A", "lora_B", "lora_E"),
    shapes=lambda settings, module: {"lora_A": "RK", "lora_B": "NR", "lora_E": "R1"},
    take=_take,
    rank=_rank,
    reads={"init_r": 12, "lora_alpha": 8, "rank_pattern": None, "init_lora_weights": True},
    check=_check,
    # LoRA's own settings say nothing here: there is one rank at the start, and one alpha.
    ignores={
        *lora_stored.IGNORES, "alpha_pattern", "beta1", "beta2", "deltaT", "lora_bias", "orth_reg_weight", "r", "target_r",
        "tfinal", "tinit", "total_step", "use_rslora",
    },
    changes={**lora_stored.CHANGES, "use_dora": "DoRA"},
)  # fmt: skip


def examples(in_features: int, out_features: int) -> Mapping[str, nn.Module]:
    """PEFT models of one layer."""
    import peft
    from transformers.pytorch_utils import Conv1D

    def config(**options):
        return peft.AdaLoraConfig(
            **{"target_modules": ["0"], "init_r": 6, "target_r": 3, "total_step": 10, "lora_alpha": 5, **options}
        )

    K, N = in_features, out_features
    models = {
        "linear": tuner.layer(nn.Linear(K, N), config()),
        "no bias": tuner.layer(nn.Linear(K, N, bias=False), config(init_r=30)),
        "Conv1D": tuner.layer(Conv1D(N, K), config(fan_in_fan_out=True)),
        "pruned": tuner.layer(nn.Linear(K, N), config()),
    }
    for model in models.values():
        for name, p in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(p)
    models["pruned"].base_model.model[0].lora_E["default"].data[2:] = 0.0
    return models


ADALORA = register(
    Method(
        name="AdaLoRA",
        taxonomy="reparameterised",
        family="L",
        layer="peft.tuners.adalora.layer.SVDLinear",
        also=("peft.tuners.adalora.bnb.SVDLinear8bitLt", "peft.tuners.adalora.bnb.SVDLinear4bit"),
        adapters="lora_A",
        held=held,
        apply=apply,
        function=adalora_linear,
        examples=examples,
        build=tuner.builder("AdaLoraConfig", "init_r", target_r=1, total_step=10),
        op="lora_linear",
        coefficients=("d",),
        nests=True,
        saves="x if lora_A trains, and (M, R) in fp32",
        merges="W + s B diag(E) A",
        peft_type="ADALORA",
        stored=STORED,
        loses_small=True,
        widens=True,
        tested={"peft": ((0, 21), (0, 21))},
    )
)
