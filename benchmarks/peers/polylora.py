"""PolyLoRA (``polylora`` on PyPI) as a provider of the benchmark of many adapters: serving, one adapter a sequence.

Plain LoRA alone is compared. It refuses rank-stabilised scaling and Conv1D layers, and it reads neither ``alpha_pattern`` nor
``modules_to_save``, embeddings or PiSSA's changed base weights: a time of what it then computes would mean nothing.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from ..core.case import Case
from .candidates import NOT_HERE
from .data import frozen_linear
from .many_data import MultiData

NAME = "layer"
NO_GRAPH = "it reads sizes back from the GPU in every call"


def missing() -> str | None:
    """Why it cannot run, or None."""
    return (
        None if importlib.util.find_spec("polylora") else "polylora is not installed (pip install --no-deps polylora)"
    )


def unusable(case: Case) -> str | None:
    """Why it cannot take a case, which is no failure."""
    if case.phase != "decode":
        return f"{NOT_HERE}polylora has one adapter for a whole sequence, and these rows change it one by one"
    if case.adapter_dtype != case.dtype:
        return f"{NOT_HERE}polylora keeps adapters in the base's dtype"
    return None


class PolyLayer:
    """PolyLoRA's layer over each of the frozen weights, every row a sequence of one token; forward only. All sets lie in
    one cache, 256 adapters at most."""

    def __init__(self, data: MultiData, dtype: torch.dtype):
        from polylora import CpuAdapterStore, LoraBatchContext, MultiLoraLinear, PolyLoraConfig
        from polylora.cache import GpuAdapterCache, ModuleSpec
        from polylora.context import use_lora_context
        from polylora.store import CpuLayerWeights

        case = data.case
        self._use, self.sets = use_lora_context, max(1, min(data.copies, 256 // case.adapters))
        store, config = CpuAdapterStore(), PolyLoraConfig(self.sets * case.adapters, max(data.ranks))
        device = torch.device(case.device)
        cache = GpuAdapterCache(store, [ModuleSpec(NAME, case.K, case.N)], config, device, dtype)
        for i in range(self.sets):
            for a, (A, B, s) in enumerate(data.lists(dtype)[i]):
                weights = CpuLayerWeights(A.detach().t(), B.detach().t(), A.shape[0], s)
                store.add_adapter(f"{i}_{a}", {NAME: weights})
        self.layers = []
        for weight in data.weight:
            self.layers.append(MultiLoraLinear(frozen_linear(weight), NAME, cache))
        lengths, ids = torch.ones(case.M, dtype=torch.int32, device=device), data.ids.tolist()
        self.contexts = []
        for i in range(self.sets):
            names = [config.base_adapter_id if a < 0 else f"{i}_{a}" for a in ids]
            self.contexts.append(LoraBatchContext(names, cache.ensure_resident(names), lengths))

    def forward(self, x: Tensor, i: int) -> Tensor:
        """y (M, N) of x (M, K) with the weight and the set of copy ``i``."""
        i %= self.sets
        with self._use(self.contexts[i]):
            return self.layers[i % len(self.layers)](x)
