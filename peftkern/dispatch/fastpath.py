"""The short way of a call on CPU tensors: one native call a pass, where the same kind of call was looked at before.

An entry returns None for a call that is not ordinary or not known; the op then takes its careful way (registry.py),
whose CPU back end leaves its choice where these entries find it. What they know is kept by settings, sizes, dtypes and
which arguments there are; addresses and strides are read, and checked, anew at each call.
"""

from __future__ import annotations

import torch

try:
    from .. import _C
except ImportError:
    _C = None


def _nothing(*args) -> None:
    """Takes no call."""


forward = getattr(_C, "lora_linear_forward", _nothing)
backward = getattr(_C, "lora_linear_backward", _nothing)
threads = torch.get_num_threads
