"""Hybrid methods, which put several others together, and unified ones, which make one form of many."""

from __future__ import annotations

from .additive import bottleneck
from .row import nothing, section

SEARCH = "a search over other methods: each layer runs the one that was found"

HYBRID = section(
    "hybrid",
    "",
    bottleneck(
        "UniPELT",
        "a gate of each sequence; its LoRA is LoRA, its prefix the library's attention",
        "unipelt",
        called="adapters.unipelt",
    ),
    bottleneck("MAM", "a parallel adapter; its prefix is the library's attention", "par_bn", called="adapters.mam"),
    *(nothing(name, SEARCH) for name in ("S4", "NOAH", "AutoPEFT", "LLM-Adapters", "S^3PET")),
    nothing("DLoRA", "decides which adapters train at a step, and where"),
)

UNIFIED = section(
    "unified",
    "",
    bottleneck("AdaMix", "the one that a step has drawn, their mean afterwards", "seq_bn"),
    bottleneck("SparseAdapter", "its matrices are pruned", "seq_bn"),
    bottleneck("ProPETL", "a shared adapter, its matrices under masks", "seq_bn"),
)  # fmt: skip

COMBINED = (*HYBRID, *UNIFIED)
