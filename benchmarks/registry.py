"""The ops that have a benchmark. A new op is a file with a ``BENCH`` and a line here."""

from __future__ import annotations

from .core.case import Bench
from .ops import lora_linear, multi_lora_linear

OPS: dict[str, Bench] = {
    "lora_linear": lora_linear.BENCH,
    "multi_lora_linear": multi_lora_linear.BENCH,
}
