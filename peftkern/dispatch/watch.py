"""Whether anybody wants to see which ops a call is made of."""

from __future__ import annotations

import torch

_compiling = torch.compiler.is_compiling
_modes, _functions = torch._C._len_torch_dispatch_stack, torch._C._len_torch_function_stack
_transform, _trace = torch._C._functorch.maybe_current_level, torch._C._get_tracing_state
_profiler = torch.autograd._profiler_enabled


def nobody_watches() -> bool:
    """False for a compiler, a tracer, a mode, a transform or a profiler."""
    return not (
        _compiling() or _modes() or _functions() or _transform() is not None or _trace() is not None or _profiler()
    )
