"""Models of one layer with the methods that train so many numbers of a transform of the weight's change."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from .. import tuner


def builder(config: str, count: int) -> Callable[[nn.Linear, int], nn.Module]:
    """What makes a model with PEFT's config of this name and ``count`` numbers, or as many as the weight has."""

    def build(linear: nn.Linear, rank: int) -> nn.Module:
        return tuner.builder(config, None, n_frequency=min(count, linear.weight.numel()))(linear, rank)

    return build


def examples(
    config: str, second: Mapping[str, Any], special: Mapping[str, Mapping[str, Any]] | None = None
) -> Callable[[int, int], Mapping[str, nn.Module]]:
    """What makes the examples. ``second``: options of a second adapter. special: an example's name -> its options."""

    def models(in_features: int, out_features: int) -> Mapping[str, nn.Module]:
        """PEFT models of one layer."""
        import peft
        from transformers.pytorch_utils import Conv1D

        def adapter(**options):
            return getattr(peft, config)(
                **{"target_modules": ["0"], "n_frequency": 30, "init_weights": False, **options}
            )

        K, N = in_features, out_features
        return {
            "linear": tuner.layer(nn.Linear(K, N), adapter()),
            "no bias, all numbers": tuner.layer(nn.Linear(K, N, bias=False), adapter(n_frequency=K * N)),
            "Conv1D": tuner.layer(Conv1D(N, K), adapter(fan_in_fan_out=True)),
            "two adapters": tuner.layer(nn.Linear(K, N), adapter(), adapter(random_loc_seed=3, **second)),
            **{name: tuner.layer(nn.Linear(K, N), adapter(**options)) for name, options in (special or {}).items()},
        }

    return models
