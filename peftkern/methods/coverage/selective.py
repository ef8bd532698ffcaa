"""Selective methods: some of the model's own parameters train."""

from __future__ import annotations

from .row import by, later, nothing, section

GRADIENT = "a gradient of the weight at the chosen entries alone"
SPARSE = "a sparse addition to the weight without a copy of it, and " + GRADIENT
WHOLE = "whole modules train: ordinary layers"

BIASES = section(
    "selective",
    "bias",
    by("BitFit", "BEFT", "the bias itself trains"),
    by("U-BitFit", "BEFT", "the bias itself trains; which ones is searched"),
    by("S-BitFit", "BEFT", "the bias itself trains; which ones is searched"),
    by("BEFT", "BEFT", called="peft.BEFT"),
)

MASKS = section(
    "selective", "mask",
    *(later(name, "M", GRADIENT) for name in (
        "U-Diff", "S-Diff", "PaFi", "FishMask", "Fish-Dip", "LT-SFT", "SAM", "Child-tuning", "threshold mask", "SPT",
    )),
    later("FAR", "M", "a gradient of the weight's chosen rows alone"),
    by("SHiRA", "SHiRA", "a weight that is made once a step, and one product with it", family="S", called="peft.SHIRA"),
    later("SuperTuning", "M", SPARSE + "; its LoRA part is lora_linear's", "peft.SUPERTUNING"),
)  # fmt: skip

MODULES = section(
    "selective",
    "module",
    nothing("LayerNorm", "the norms train, no linear layer changes", "M", "peft.LN_TUNING"),
    nothing("BatchNorm", "the norms train, no linear layer changes", "M"),
    nothing("Xattn", WHOLE),
    nothing("attention tuning", WHOLE),
    nothing("linear probe", WHOLE),
    nothing("trainable tokens", "rows of the embedding train", called="peft.TRAINABLE_TOKENS"),
)

SELECTIVE = (*BIASES, *MASKS, *MODULES)
