"""Many adapters on the CUDA kernels: the branch by one native call behind the vendor's base product."""

from __future__ import annotations

import torch
from torch import Tensor

from ...equation import PLACES
from ...problem import Problem
from ...settings import Settings
from ..marshal import CODES, memory
from . import native
from .native import rows

VECTORS = {*(place.symbol for place in PLACES), "beta", "save_base"}


def decline(problem: Problem, now: Settings) -> str | None:
    """Why no kernel here can take the problem."""
    if problem.dtype not in CODES:
        return f"no kernel for {problem.dtype}"
    if max(problem.M, problem.N, problem.K) >= 2**31:
        return "a size is 2^31 or more"
    kernel = problem.R, CODES[problem.dtype], int(problem.arch.removeprefix("sm_"))
    if vectors := sorted(problem.flags.intersection(VECTORS)):
        return f"no kernel with vectors ({', '.join(vectors)})"
    if problem.op == "sgmv_add":
        return None if native._C.cuda_sgmv_takes(*kernel) else "the ranks take more shared memory than a block has"
    if "dropout" in problem.flags or "base" not in problem.flags:
        return "no kernel with dropout, or without a base"
    if now.batch_invariant:
        return "the base product is the vendor's"
    if not native._C.cuda_sgmv_in_clusters(*kernel):
        return "u is made by sm_90 and up, in bfloat16 or float16, up to rank 512"
    return None


def _branch(c) -> tuple:
    """What ``cuda_sgmv_add`` takes of the branch. Copies are made now, before the launch that makes what it is added to."""
    weights, scaling = tuple(map(memory, c.weights)), c.scaling.to(torch.float32).contiguous()
    return rows(c.x), weights, c.table.contiguous(), scaling, c.max_rank, c.order.contiguous(), c.starts.contiguous()


def sgmv_add(c) -> None:
    """Adds the branch to ``out``, see ``peftkern.ops.sgmv``."""
    with native.on_device(c.x):
        into = rows(c.out)
        native.start(native._C.cuda_sgmv_add, c.x, *_branch(c), False, False, into=into)
        if into is not c.out:
            c.out.copy_(into)


def multi_lora_linear_fwd(c) -> tuple[Tensor, Tensor, Tensor]:
    """(y, u, h), see ``peftkern.ops.multi_lora_linear``; h is empty, as no call without vectors asks for it."""
    bias = c.bias
    with native.on_device(c.x):
        branch = _branch(c)
        same = bias is None or bias.dtype == c.x.dtype
        y = torch.nn.functional.linear(branch[0], c.base[0], bias if same else None)
        if not same:
            y += bias
        # The vendor's kernel was launched just now if there was anything to compute.
        dependent = same and y.numel() * c.x.shape[1] > 0
        u = native.start(native._C.cuda_sgmv_add, c.x, *branch, True, dependent, into=y)
    return y, u, c.x.new_empty(0)


OPS = {"sgmv_add": sgmv_add, "multi_lora_linear_fwd": multi_lora_linear_fwd}
