"""Hybrid methods, which put several others together, and unified ones, which make one form of many."""

from __future__ import annotations

from .row import later, nothing, section

SEARCH = "a search over other methods: each layer runs the one that was found"
BOTTLENECK = "family B's kernel"

HYBRID = section(
    "hybrid",
    "",
    later("UniPELT", "B", f"{BOTTLENECK}, and gates on adapter, LoRA and prefix", "adapters.unipelt"),
    later("MAM", "B", f"{BOTTLENECK}; its prefix is the library's attention", "adapters.mam"),
    *(nothing(name, SEARCH) for name in ("S4", "NOAH", "AutoPEFT", "LLM-Adapters", "S^3PET")),
    nothing("DLoRA", "decides which adapters train at a step, and where"),
)

UNIFIED = section(
    "unified",
    "",
    later("AdaMix", "B", f"{BOTTLENECK}, on the adapter that a step has drawn"),
    later("SparseAdapter", "B", f"{BOTTLENECK}, on pruned matrices"),
    later("ProPETL", "B", f"{BOTTLENECK}, on a shared adapter under masks"),
)

COMBINED = (*HYBRID, *UNIFIED)
