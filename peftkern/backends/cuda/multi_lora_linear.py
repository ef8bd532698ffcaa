"""Many adapters on the CUDA kernels: the branch in one launch behind the vendor's base product."""

from __future__ import annotations

import torch
from torch import Tensor

from ...equation import PLACES
from ...problem import Problem
from ...settings import Settings
from . import native
from .native import matrix, pointer, rows

VECTORS = {*(place.symbol for place in PLACES), "beta", "save_base"}


def decline(problem: Problem, now: Settings) -> str | None:
    """Why no kernel here can take the problem."""
    if problem.dtype not in native.CODES:
        return f"no kernel for {problem.dtype}"
    if max(problem.M, problem.N, problem.K) >= 2**31:
        return "a size is 2^31 or more"
    kernel = problem.R, native.CODES[problem.dtype], int(problem.arch.removeprefix("sm_"))
    if vectors := sorted(problem.flags.intersection(VECTORS)):
        return f"no kernel with vectors ({', '.join(vectors)})"
    if problem.op == "sgmv_add":
        return None if native._C.cuda_sgmv_takes(*kernel) else "the ranks take more shared memory than a block has"
    if problem.flags & {"dropout", "identity"} or "base" not in problem.flags:
        return "no kernel with dropout, or without a base weight"
    if now.batch_invariant:
        return "the base product is the vendor's"
    if not native._C.cuda_sgmv_in_clusters(*kernel):
        return "u is made by sm_90 and up, in bfloat16 or float16, up to rank 512"
    return None


class _Branch:
    """A call's branch: all that it reads is there when this is made, and ``add`` is one launch."""

    def __init__(self, c, N: int):
        x, weights, max_rank = c.x, c.weights, c.max_rank
        # Copies are kept here until after the launch.
        self.x, self.table, self.scaling = rows(x), c.table.contiguous(), native.vector(c.scaling)
        self.order, self.starts = c.order.contiguous(), c.starts.contiguous()
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


def sgmv_add(c):
    """Adds the branch to ``out``, see ``peftkern.ops.sgmv``."""
    with native.on_device(c.x):
        into = rows(c.out)
        _Branch(c, c.out.shape[1]).add(into)
        if into is not c.out:
            c.out.copy_(into)


def multi_lora_linear_fwd(c):
    """(y, u, h), see ``peftkern.ops.multi_lora_linear``; h is empty, as no call without vectors asks for it."""
    x, bias = c.x, c.bias
    with native.on_device(x):
        branch = _Branch(c, c.out_features)
        u = torch.empty((branch.M, c.max_rank), dtype=torch.float32, device=x.device)
        same = bias is None or bias.dtype == x.dtype
        y = torch.nn.functional.linear(branch.x, c.base[0], bias if same else None)
        if not same:
            y += bias
        # The vendor's kernel was launched just now if there was anything to compute.
        branch.add(y, u, dependent=same and y.numel() * branch.K > 0)
    return y, u, x.new_empty(0)


OPS = {"sgmv_add": sgmv_add, "multi_lora_linear_fwd": multi_lora_linear_fwd}
