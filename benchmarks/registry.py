"""The ops that have a benchmark. A new op is a file in ops/ with a ``BENCH``, and its name here."""

from __future__ import annotations

from .core.bench import Bench
from .ops import bottleneck_adapter, lora_linear, multi_lora_linear

OPS: dict[str, Bench] = {op.BENCH.name: op.BENCH for op in (bottleneck_adapter, lora_linear, multi_lora_linear)}
