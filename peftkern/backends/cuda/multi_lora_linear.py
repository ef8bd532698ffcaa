"""Many adapters on the CUDA kernels: the branch in one launch behind the vendor's base product."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import settings
from ...problem import Problem
from . import native
from .native import matrix, pointer, rows


def decline(problem: Problem) -> str | None:
    """Why no kernel here can take the problem."""
    if problem.dtype not in native.CODES:
        return f"no kernel for {problem.dtype}"
    if max(problem.M, problem.N, problem.K) >= 2**31:
        return "a size is 2^31 or more"
    kernel = problem.R, native.CODES[problem.dtype], int(problem.arch.removeprefix("sm_"))
    if problem.op == "sgmv_add":
        return None if native._C.cuda_sgmv_takes(*kernel) else "the ranks take more shared memory than a block has"
    if "dropout" in problem.flags or "base" not in problem.flags:
        return "no kernel with dropout, or without a base weight"
    if settings.current().batch_invariant:
        return "the base product is the vendor's"
    if not native._C.cuda_sgmv_in_clusters(*kernel):
        return "u is made by sm_90 and up, in bfloat16 or float16, up to rank 512"
    return None


class _Branch:
    """A call's branch: all that it reads is there when this is made, and ``add`` is one launch."""

    def __init__(self, x: Tensor, N: int, weights, table: Tensor, scaling: Tensor, max_rank: int, order, starts):
        # Copies are kept here until after the launch.
        self.x, self.table, self.scaling = rows(x), table.contiguous(), native.vector(scaling)
        self.order, self.starts = order.contiguous(), starts.contiguous()
        self.tensors, self.max_rank = native.addresses(weights, x), max_rank
        self.M, self.N, self.K = x.shape[0], N, x.shape[1]
        self.adapter_dtype = native.CODES[weights[0].dtype if weights else x.dtype]
        self.arch = native.device(x).arch
        kernel = max_rank, native.CODES[x.dtype], self.arch
        self.partial = native.floats(native._C.cuda_sgmv_partials(self.M, self.K, *kernel), x)
        words = native._C.cuda_sgmv_counters(self.M, *kernel)
        self.counters = native.counters(words, x) if words else None

    def add(self, out: Tensor, u: Tensor | None = None, *, dependent: bool = False) -> None:
        """Adds to ``out`` (adjacent columns). ``dependent``: the launch before makes ``out``, and nothing else of this."""
        native._C.cuda_sgmv_add(
            matrix(out), matrix(self.x), self.M, self.N, self.K, self.adapter_dtype, pointer(self.tensors),
            pointer(self.table), self.table.shape[0], self.max_rank, pointer(self.scaling), pointer(self.order),
            pointer(self.starts), pointer(u), pointer(self.partial), pointer(self.counters), dependent, self.arch,
            native.stream(self.x),
        )  # fmt: skip


def sgmv_add(out, x, weights, table, scaling, max_rank, order, starts):
    """Adds the branch to ``out``, see ``peftkern.ops.sgmv``."""
    with native.on_device(x):
        into = rows(out)
        _Branch(x, out.shape[1], weights, table, scaling, max_rank, order, starts).add(into)
        if into is not out:
            out.copy_(into)


def multi_lora_linear_fwd(
    x, weight, out_features, bias, weights, table, scaling, max_rank, order, starts, dropout_p, seed
):
    """(y, u), see ``peftkern.ops.multi_lora_linear``."""
    with native.on_device(x):
        branch = _Branch(x, out_features, weights, table, scaling, max_rank, order, starts)
        u = torch.empty((branch.M, max_rank), dtype=torch.float32, device=x.device)
        same = bias is None or bias.dtype == x.dtype
        y = torch.nn.functional.linear(branch.x, weight, bias if same else None)
        if not same:
            y += bias
        # The vendor's kernel was launched just now if there was anything to compute.
        branch.add(y, u, dependent=same and y.numel() * branch.K > 0)
    return y, u


OPS = {"sgmv_add": sgmv_add, "multi_lora_linear_fwd": multi_lora_linear_fwd}
