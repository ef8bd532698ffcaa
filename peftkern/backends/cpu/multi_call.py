"""multi_lora_linear's passes as one native call each (csrc/bindings/multi_lora_linear.cpp), as call.py has lora_linear's.

    given     = adapters(weights, table, scaling, max_rank, in_features, out_features, fixed)
    y         = forward(settings, threads, x, kind, weight, bias, given, order, starts, dropout_p, seed, False)
    y, u      = forward(..., True)
    dx, dbias, grads = backward(settings, threads, dy, x, u, kind, weight, given, order, starts, dropout_p, seed,
                                need_x, need_bias, need)
    True      = add(settings, threads, out, x, given, order, starts)        out += the branch

``given`` holds its tensors. It reads ``table`` and ``scaling`` once; the weights too if they are ``fixed``, which is for
those whose memory never moves, and else at every call. Weights are contiguous. kind: of the base (peftkern/bases), or
"none"; weight: None where the kind has none. need: a tuple of a bool per tensor of weights. What no needed gradient reads may
be None.
"""

from __future__ import annotations

from . import call
from .native import _C

if call.unavailable is None:
    adapters, add, learn_add = _C.adapters, _C.sgmv_add, _C.sgmv_add_learn
    forward, learn_forward = _C.multi_lora_linear_forward, _C.multi_lora_linear_forward_learn
    backward, learn_backward = _C.multi_lora_linear_backward, _C.multi_lora_linear_backward_learn
else:
    adapters = add = learn_add = forward = learn_forward = backward = learn_backward = call.nothing
