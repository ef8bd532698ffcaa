"""Methods that are put together of ``bottleneck_adapter`` and a few steps of torch's own, a file each.

Those that are one or several ``BottleneckAdapter`` as they are have no file: Houlsby, Pfeiffer, parallel, AdapterPlus,
AdaptFormer, LLM-Adapters, MAM (with a prefix), UniPELT (``gate``), AdapterDrop (fewer of them), AdaMix (one of a list, drawn
for each step; afterwards one of their means), SparseAdapter and ProPETL (``down`` and ``up`` times masks).
"""

from .fusion import adapter_fusion
from .invertible import Invertible
from .phm import phm_weight
from .prefix import attention, merged, prefix_attention

__all__ = ["Invertible", "adapter_fusion", "attention", "merged", "phm_weight", "prefix_attention"]
