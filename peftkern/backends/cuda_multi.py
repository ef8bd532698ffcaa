"""Many adapters on the CUDA kernels: the branch in one launch behind the base product."""

from __future__ import annotations

from ..problem import Problem
from . import cuda_native as native
from .cuda_native import matrix, pointer, rows


def decline(problem: Problem) -> str | None:
    """Why no kernel here can take the problem."""
    if problem.dtype not in native.CODES:
        return f"no kernel for {problem.dtype}"
    return "a size is 2^31 or more" if max(problem.M, problem.N, problem.K) >= 2**31 else None


def sgmv_add(out, x, weights, table, scaling, max_rank, order, starts):
    """Adds the branch to ``out``, see ``peftkern.ops.sgmv``."""
    (M, N), K = out.shape, x.shape[1]
    with native.on_device(x):
        # Names, so that no copy is freed before the launch.
        x, into, table, scaling = rows(x), rows(out), table.contiguous(), native.vector(scaling)
        order, starts, tensors = order.contiguous(), starts.contiguous(), native.addresses(weights, x)
        kernel = max_rank, native.CODES[x.dtype], native.device(x).arch
        partial = native.floats(native._C.cuda_sgmv_partials(M, K, *kernel), x)
        words = native._C.cuda_sgmv_counters(M, *kernel)
        counters = native.counters(words, x) if words else None
        native._C.cuda_sgmv_add(
            matrix(into), matrix(x), M, N, K, native.CODES[weights[0].dtype if weights else x.dtype],
            pointer(tensors), pointer(table), table.shape[0], max_rank, pointer(scaling), pointer(order),
            pointer(starts), pointer(partial), pointer(counters), False, native.device(x).arch, native.stream(x),
        )  # fmt: skip
        if into is not out:
            out.copy_(into)


OPS = {"sgmv_add": sgmv_add}
