"""The ops: one file each, with the equation, the reference, the schema, the shape rule and the argument checks."""

from . import block_rotate, bottleneck_adapter, dropout_mask, lora_linear, lora_row_norm, multi_lora_linear, sgmv

__all__ = [
    "block_rotate",
    "bottleneck_adapter",
    "dropout_mask",
    "lora_linear",
    "lora_row_norm",
    "multi_lora_linear",
    "sgmv",
]
