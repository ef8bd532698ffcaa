"""The calls that the tuner times: inputs of a job on the GPU, and each candidate as a function of which copy to take.

Candidates are called as the back ends call them, below dispatch, so that nothing but the launches differs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from peftkern.dispatch import registry as dispatch
from peftkern.dispatch.choose import load
from peftkern.kernels import configs
from peftkern.problem import TritonWay
from peftkern.settings import current

from ..core.case import DTYPES
from .plan import COMPOSITION, DROPOUT_P, Candidate, Job

SCALING = 2.0
ADAPTERS = 64


@dataclass
class Inputs:
    """``arguments`` of the op and, where plain torch would have kept one, a dropout ``mask``: one of each a copy."""

    job: Job
    arguments: list[tuple]
    masks: list[Tensor]


def _normal(generator: torch.Generator, device: str, dtype: torch.dtype, *shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=generator, device=device).mul_(scale).to(dtype)


def make_inputs(job: Job, count: int, device: str) -> Inputs:
    """Random inputs; lora_B is not zero."""
    generator = torch.Generator(device).manual_seed(0)
    dtype, adapter = DTYPES[job.dtype], DTYPES[job.adapter_dtype]
    normal = functools.partial(_normal, generator, device, dtype)
    small = functools.partial(_normal, generator, device, adapter)
    M, N, K, R = job.M, job.N, job.K, job.R
    seed = torch.full((1,), 1234, dtype=torch.int64, device=device)
    p, drop = (DROPOUT_P, seed) if job.dropout else (0.0, None)
    A, B = small(R, K, scale=K**-0.5), small(N, R, scale=R**-0.5)
    rank = functools.partial(_normal, generator, device, torch.float32, M, R)

    def one() -> tuple:
        if job.op == "lora_linear_fwd":
            return normal(M, K), normal(N, K, scale=K**-0.5), A, B, None, SCALING, p, drop, *[None] * 5, False
        if job.op == "lora_linear_bwd_input":
            return normal(M, N), rank(), None, normal(N, K, scale=K**-0.5), A, p, drop, None, None, None, False
        if job.op == "lora_linear_bwd_adapter":
            needs = True, True, False, False, False, False, False
            return normal(M, N), normal(M, K), rank(), None, A, B, SCALING, p, drop, None, None, None, *needs
        if job.op == "lora_row_norm":
            return normal(N, K, scale=K**-0.5), A, B, SCALING
        x, tables = _many(normal, small, M, N, K, R)
        if job.op == "sgmv_add":
            return normal(M, N), x, *tables
        return x, normal(N, K, scale=K**-0.5), N, None, *tables, None, None

    masks = []
    if job.dropout and job.op == "lora_linear_bwd_input":
        masks = [torch.empty(M, K, dtype=dtype, device=device).bernoulli_(1 - DROPOUT_P) for _ in range(count)]
    return Inputs(job, [one() for _ in range(count)], masks)


def _many(normal, small, M: int, N: int, K: int, R: int) -> tuple[Tensor, tuple]:
    # x, and what the ops take of adapters and route. Every copy has adapters of its own: they are most of what is read.
    from peftkern.many.route import route
    from peftkern.many.table import table_of

    x, count = normal(M, K), min(M, ADAPTERS)
    pairs = [(small(R, K, scale=K**-0.5), small(N, R, scale=R**-0.5), SCALING) for _ in range(count)]
    state = table_of(pairs, x, x.dtype)
    order, starts = route(torch.arange(M, device=x.device) % count, x, state)
    return x, (list(state.weights), state.table, state.scaling, state.max_rank, order, starts)


def call_of(candidate: Candidate, inputs: Inputs, arch: int) -> tuple[Callable[[int], object] | None, str | None]:
    """(the call on copy i, None), or (None, why this candidate cannot run here)."""
    job, arguments = inputs.job, inputs.arguments
    if candidate.name == COMPOSITION:
        return functools.partial(_composition, inputs), None
    if candidate.name == "reference":
        return lambda i: dispatch.OPS[job.op].reference(*arguments[i]), None
    module, now = load("cuda" if candidate.name == "cuda" else "triton"), current()
    reason = module.unavailable(now)
    if reason is None and job.op not in module.OPS:
        reason = f"has no kernel for {job.op}"
    if reason is None:
        reason = module.decline(job.problem(arch), now)
    if reason is not None:
        return None, reason
    function = module.OPS[job.op]
    if candidate.name != "cuda":
        fixed = {"base": candidate.name} if candidate.name in configs.BASES else {}
        fixed |= {"gemm": candidate.config} if candidate.config else {}
        function = functools.partial(function, way=TritonWay(fixed=configs.fixed(**fixed)))
    return lambda i: function(*arguments[i]), None


def _composition(inputs: Inputs, i: int) -> object:
    """The vendor's product and ``addmm_`` in the dtype of x, as in addmm.py, pass by pass."""
    job, a = inputs.job, inputs.arguments[i]
    if job.op == "lora_linear_fwd":
        x, weight, A, B = a[:4]
        dropped = x
        if job.dropout:
            dropped = x * torch.empty_like(x).bernoulli_(1 - DROPOUT_P).div_(1 - DROPOUT_P)
        u = dropped @ A.to(x.dtype).t()
        return (x @ weight.t()).addmm_(u, B.to(x.dtype).t(), alpha=SCALING)
    if job.op == "lora_linear_bwd_input":
        dy, du, weight, A = a[0], a[1], a[3], a[4]
        dx, du, A = dy @ weight, du.to(dy.dtype), A.to(dy.dtype)
        return dx.addcmul_(du @ A, inputs.masks[i]) if job.dropout else dx.addmm_(du, A)
    dy, x, u, A, B = a[0], a[1], a[2], a[4], a[5]
    dS = (dy @ B.to(dy.dtype)).mul_(SCALING)
    return dS, (dS.t() @ x).to(A.dtype), (dy.t() @ u.to(dy.dtype)).mul_(SCALING).to(B.dtype)
