"""multi_lora_linear's passes as one native call each (csrc/bindings/multi_lora_linear.cpp), as call.py has lora_linear's.

    given     = adapters(weights, table, scaling, max_rank, in_features, out_features, fixed, vectors)
    y         = forward(settings, threads, x, kind, weight, bias, given, order, starts, dropout_p, seed, False, False)
    y, u, h   = forward(..., want_u, want_h)                                None for what is not wanted
    dx, dbias, grads, sums = backward(settings, threads, dy, x, u, kind, weight, given, order, starts, dropout_p, seed,
                                      need_x, need_bias, need, h, need_vectors)
    weights, ranks, scalings, out_features = adapter_list(adapters, in_features, dtype)    of a list of pairs, checked
    True      = add(settings, threads, out, x, given, order, starts)        out += the branch

``given`` holds its tensors. It reads ``table`` and ``scaling`` once; weights and vectors too if they are ``fixed``, which is
for those whose memory never moves, and else at every call. Both are contiguous, vectors in fp32. kind: of the base
(peftkern/bases), or "none"; weight: None where the kind has none. need, need_vectors: a tuple of a bool per tensor of
weights and vectors. What no needed gradient reads may be None.
"""

from __future__ import annotations

from . import call
from .native import _C

if call.unavailable is None:
    adapter_list = _C.adapter_list
    adapters, add, learn_add = _C.adapters, _C.sgmv_add, _C.sgmv_add_learn
    forward, learn_forward = _C.multi_lora_linear_forward, _C.multi_lora_linear_forward_learn
    backward, learn_backward = _C.multi_lora_linear_backward, _C.multi_lora_linear_backward_learn
else:
    adapters = adapter_list = add = learn_add = forward = learn_forward = backward = learn_backward = call.nothing
