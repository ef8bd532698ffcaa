"""PEFT checkpoints on a plain transformers model, a batch at a time, whatever its mix of adapters.

From the folder to the layer: ``checkpoint`` (``config``, ``weights``, ``keys``: what a folder holds and may mean), ``fit``
(which layers it belongs to; ``reach``: whether a call gets there), ``multi_lora`` (the adapters of a model; ``use``), ``request``
(those of a batch, in their context), ``entry`` (where the batch comes in), ``rows`` (``row_rules``: whose rows a layer
gets), ``layer`` (its forward), ``compiled`` (the same under torch.compile).
"""

from .multi_lora import MultiLoRA, attach_adapters

__all__ = ["MultiLoRA", "attach_adapters"]
