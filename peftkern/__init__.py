"""peftkern: fused kernels for LoRA and other parameter-efficient fine-tuning.

Importing this package starts no GPU, loads no Triton and no PEFT, and changes no other package.
"""

from __future__ import annotations

import importlib

from ._version import __version__
from .autograd.expert_lora_linear import expert_lora_linear
from .autograd.lora_linear import lora_linear
from .autograd.multi_lora_linear import multi_lora_linear, sgmv
from .autograd.residual.bottleneck_adapter import bottleneck_adapter
from .autograd.residual.multi_bottleneck_adapter import Bottleneck, multi_bottleneck_adapter
from .autograd.residual.reft import reft
from .bases.quantize import quantize
from .many.adapter import Adapter
from .many.bank import AdapterBank
from .methods import FUNCTIONS
from .nn import BottleneckAdapter, LoRALinear, ReFT, reft_positions
from .ops.dropout_mask import dropout_mask

globals().update(FUNCTIONS)

# Names that need HF PEFT, AdapterHub's adapters or transformers are looked up at first use.
_LAZY = {
    **dict.fromkeys(("accelerate", "restore", "status"), "peftkern.integrations.model"),
    "Report": "peftkern.integrations.report",
    **dict.fromkeys(("attach_adapters", "MultiLoRA"), "peftkern.integrations.attach"),
}

__all__ = [
    "Adapter", "AdapterBank", "Bottleneck", "BottleneckAdapter", "LoRALinear", "ReFT", "__version__", "bottleneck_adapter",
    "dropout_mask", "expert_lora_linear", "lora_linear", "multi_bottleneck_adapter", "multi_lora_linear", "quantize", "reft",
    "reft_positions", "sgmv", *FUNCTIONS, *_LAZY,
]  # fmt: skip


def __getattr__(name: str):
    if name in _LAZY:
        try:
            return getattr(importlib.import_module(_LAZY[name]), name)
        except ModuleNotFoundError as error:
            package = (error.name or "peftkern").partition(".")[0]
            if package == "peftkern":
                raise
            command = f"pip install {package}"
            raise ModuleNotFoundError(f"peftkern.{name} needs {package}: {command}", name=error.name) from None
    raise AttributeError(f"module 'peftkern' has no attribute {name!r}")
