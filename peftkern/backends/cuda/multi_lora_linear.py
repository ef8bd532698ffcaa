"""Many adapters on the CUDA kernels: the branch, and what else a row's vectors ask for, by one native call behind the
vendor's base product. Vectors p_b take a pass over x in front of it."""

from __future__ import annotations

import torch
from torch import Tensor

from ...problem import Problem
from ...settings import Settings
from ..marshal import CODES, memory
from . import native
from .native import rows


def decline(problem: Problem, now: Settings) -> str | None:
    """Why no kernel here can take the problem."""
    if problem.dtype not in CODES:
        return f"no kernel for {problem.dtype}"
    if max(problem.M, problem.N, problem.K) >= 2**31:
        return "a size is 2^31 or more"
    if "curved" in problem.flags:
        return "no kernel for adapters with an activation or a bias of the rank"
    kernel = problem.R, CODES[problem.dtype], int(problem.arch.removeprefix("sm_"))
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
    """What native calls take of x and its adapters. Copies are made now, before the launch that makes what is added to."""
    weights, scaling = tuple(map(memory, c.weights)), c.scaling.to(torch.float32).contiguous()
    vectors = tuple(map(memory, c.vectors)) if c.acting else ()
    route = c.order.contiguous(), c.starts.contiguous()
    return rows(c.x), weights, c.table.contiguous(), scaling, c.max_rank, *route, vectors


def sgmv_add(c) -> None:
    """Adds the branch to ``out``, see ``peftkern.ops.sgmv``."""
    with native.on_device(c.x):
        into = rows(c.out)
        native.start(native._C.cuda_sgmv_add, c.x, *_branch(c), None, None, False, False, into=into)
        if into is not c.out:
            c.out.copy_(into)


def multi_lora_linear_fwd(c) -> tuple[Tensor, Tensor, Tensor]:
    """(y, u, h), see ``peftkern.ops.multi_lora_linear``."""
    acting, bias = c.acting.split(), c.bias
    # The vendor's product may have the bias where every row gets that, and the kernel takes the product as it is.
    apart = bias is not None and (bias.dtype != c.x.dtype or c.save_base or "g_b" in acting or "beta" in acting)
    with native.on_device(c.x):
        branch, own = _branch(c), bias.contiguous() if apart else None
        x = native.start(native._C.cuda_scale_rows, c.x, *branch) if "p_b" in acting else branch[0]
        product = torch.nn.functional.linear(x, c.base[0], None if apart else bias)
        y, kept = (torch.empty_like(product), product) if c.save_base else (product, None)
        # The vendor's kernel was launched just now if there was anything to compute.
        dependent = y.numel() * c.x.shape[1] > 0
        u = native.start(native._C.cuda_sgmv_add, c.x, *branch, own, kept, True, dependent, into=y)
    return y, u, c.x.new_empty(0) if kept is None else kept


OPS = {"sgmv_add": sgmv_add, "multi_lora_linear_fwd": multi_lora_linear_fwd}
