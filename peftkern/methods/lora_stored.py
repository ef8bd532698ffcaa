"""Checkpoints of LoRA and its variants: what PEFT's LoraConfig (0.21) says, and what their tensors mean."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .stored import Settings, Stored, Unfit, check_names, check_number, check_patterns, check_rank, of_module

READS = {
    "r": 8, "lora_alpha": 8, "rank_pattern": None, "alpha_pattern": None, "use_rslora": False, "use_dora": False,
    "lora_bias": False, "init_lora_weights": True,
}  # fmt: skip
# Training, and options of settings that are refused themselves. VeLoRA and MonteCLoRA compute something else than LoRA in
# training only. merge_weights is of the first releases (whether eval() merged), lora_dtype of ms-swift, a trainer that
# writes PEFT's folders.
IGNORES = {
    "corda_config", "ensure_weight_tying", "eva_config", "loftq_config", "lora_dropout", "lora_dtype", "lora_ga_config",
    "megatron_core", "merge_weights", "monteclora_config", "qalora_group_size", "runtime_config", "velora_config",
}  # fmt: skip
CHANGES = {
    "alora_invocation_tokens": "aLoRA, which acts on some tokens of a row", "arrow_config": "an Arrow router",
    "enable_lora": "adapters of a fused layer's parts (PEFT before 0.3)",
    "kasa_config": "KaSA, which has changed the base weights", "layer_replication": "a model with repeated layers",
    "megatron_config": "a layer of Megatron", "target_parameters": "adapters of parameters",
    "trainable_token_indices": "trained embeddings of tokens", "use_bdlora": "BD-LoRA", "use_qalora": "QALoRA",
}  # fmt: skip
# Ways to begin that leave the base weights as they are when an adapter is loaded; the others (PiSSA, OLoRA, CorDA,
# LoftQ) change them.
_INIT = (True, False, None, "gaussian", "eva", "lora_ga", "mica", "orthogonal")
A, B, BIAS, MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_magnitude_vector"


def check_init(settings: Settings) -> None:
    """``Unfit`` for adapters that begin by changing the base weights."""
    if settings["init_lora_weights"] not in _INIT:
        raise Unfit("init_lora_weights", f"is {settings['init_lora_weights']!r}, which changes the base weights")


def _check(settings: Settings) -> None:
    check_init(settings)
    check_rank(settings, "r")
    check_number(settings, "lora_alpha")
    check_patterns(settings, "rank_pattern", ranks=True)
    check_patterns(settings, "alpha_pattern")
    if settings["lora_bias"] and settings["use_dora"]:
        raise Unfit("lora_bias", f"is {settings['lora_bias']!r} along with use_dora, which has no such bias")


def _rank(settings: Settings, module: str) -> int:
    return of_module(settings["rank_pattern"], module, settings["r"])


def _scaling(settings: Settings, module: str) -> float:
    # alpha over the rank, or over its root (rsLoRA)
    alpha, rank = of_module(settings["alpha_pattern"], module, settings["lora_alpha"]), _rank(settings, module)
    return alpha / (math.sqrt(rank) if settings["use_rslora"] else rank)


def _shapes(settings: Settings, module: str) -> dict[str, str]:
    shapes = {A: "RK", B: "NR"}
    if settings["lora_bias"]:
        shapes[BIAS] = "N"
    if settings["use_dora"]:
        shapes[MAGNITUDE] = "N"
    return shapes


def _take(settings: Settings, module: str, tensors: Mapping[str, Tensor]) -> tuple[tuple, tuple]:
    magnitude = (tensors[MAGNITUDE],) if settings["use_dora"] else ()
    return (tensors[A], tensors[B], tensors.get(BIAS), *magnitude), (_scaling(settings, module),)


def _parameters(settings: Settings, module: str) -> list[str]:
    # A target is a parameter's path or the end of it.
    of = {name: name.rpartition(".")[2] for name in settings["target_parameters"]}
    return [last for name, last in of.items() if f".{module}.{last}".endswith(f".{name}")]


def _expert_shapes(settings: Settings, module: str) -> dict[str, str]:
    # Those of a parameter lie behind each other; of two the first one's are called as what is inside of the other's.
    own = _parameters(settings, module)
    if not own:
        return _shapes(settings, module)
    outer, inner = {A: "GK", B: "NG"}, {f"base_layer.{A}": "HI", f"base_layer.{B}": "OH"}
    return outer if len(own) == 1 else outer | inner


def _check_experts(settings: Settings) -> None:
    check_names(settings, "target_parameters", pattern=False)
    alone = [name for name in settings["target_parameters"] if "." not in name]
    if alone:
        raise Unfit("target_parameters", f"names {alone[0]!r} without its module, which may be of any")
    if settings["lora_bias"]:
        raise Unfit("lora_bias", f"is {settings['lora_bias']!r} along with target_parameters, which have no such bias")
    _check(settings)


_COMMON: dict[str, Any] = dict(
    names=(A, B, BIAS),
    shapes=_shapes,
    take=_take,
    rank=_rank,
    reads=READS,
    check=_check,
    ignores=IGNORES,
    changes=CHANGES,
)
LORA = Stored(**_COMMON, base=lambda settings: bool(settings["lora_bias"]))
DORA = Stored(**{**_COMMON, "names": (A, B, BIAS, MAGNITUDE)}, switch="use_dora", base=lambda settings: True)
EXPERTS = Stored(
    **{
        **_COMMON,
        "shapes": _expert_shapes,
        "reads": {**READS, "target_parameters": None},
        "check": _check_experts,
        "changes": {key: meaning for key, meaning in CHANGES.items() if key != "target_parameters"},
    },
    switch="target_parameters",
    parameters=_parameters,
)
