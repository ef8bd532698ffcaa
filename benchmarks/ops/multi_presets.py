"""What a run of the multi_lora_linear benchmark measures."""

from __future__ import annotations

from dataclasses import dataclass

# From this many rows on a case is training, with both passes; below, decoding.
TRAINING_ROWS = 257


@dataclass(frozen=True)
class Entry:
    """One population at one size. M rows, K in_features, N out_features, R the largest rank. ``adapter_dtypes``:
    ``same`` as the activations, or a name."""

    M: int
    adapters: int
    mix: str = "uniform"
    base_share: float = 0.0
    ranks: str = "same"
    R: int = 16
    K: int = 4096
    N: int = 4096
    adapter_dtypes: tuple[str, ...] = ("same",)
    dropouts: tuple[float, ...] = (0.0,)


BOTH = ("fp32", "same")

QUICK = (
    Entry(32, 32, "distinct"),
    Entry(32, 1),
    Entry(256, 32, "zipf", 0.5, "mixed", R=64),
    Entry(512, 8),
    Entry(512, 8, base_share=1.0),
    Entry(2048, 8),
)

FULL = (
    # Decoding: rows that all differ; from one adapter to many; populations; base rows; ranks; a wide layer.
    *(Entry(M, M, "distinct") for M in (1, 4, 16, 32, 64, 128, 256)),
    *(Entry(32, count) for count in (1, 2, 4, 8, 16)),
    *(Entry(32, 32, mix) for mix in ("zipf", "skewed", "identical")),
    *(Entry(32, 32, "distinct", share) for share in (0.5, 1.0)),
    Entry(32, 32, "distinct", ranks="mixed", R=64),
    Entry(32, 32, "distinct", N=14336),
    # Prefill and training.
    *(Entry(512, count) for count in (1, 2, 4, 16, 32, 64)),
    Entry(512, 8, adapter_dtypes=BOTH, dropouts=(0.0, 0.1)),
    *(Entry(512, 8, mix) for mix in ("zipf", "skewed", "identical")),
    *(Entry(512, 8, base_share=share) for share in (0.5, 1.0)),
    Entry(512, 8, ranks="mixed", R=64),
    Entry(2048, 8, adapter_dtypes=BOTH),
    Entry(2048, 8, "zipf", 0.5, "mixed", R=64),
)

# What a GPU is judged on, and what lies around it. bf16 alone.
GPU = (
    Entry(64, 64, "distinct", adapter_dtypes=BOTH),
    Entry(64, 64, "distinct", N=14336),
    Entry(64, 8),
    Entry(64, 1),
    Entry(64, 64, "distinct", 0.5),
    Entry(64, 64, "distinct", ranks="mixed", R=64),
    Entry(8 * 512, 8, "sorted", adapter_dtypes=BOTH),
)

PRESETS = {"quick": QUICK, "full": FULL, "gpu": GPU}
DTYPES = {"gpu": ("bf16",)}
