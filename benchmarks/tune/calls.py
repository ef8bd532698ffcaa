"""The calls that the tuner times: inputs of a job on the GPU, and each candidate as a function of which copy to take.

Candidates are called as the back ends call them, below dispatch, so that nothing but the launches differs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from peftkern.dispatch.choose import load
from peftkern.kernels import configs
from peftkern.ops.lora_row_norm import RowNorm
from peftkern.ops.multi_lora_linear import MultiForward
from peftkern.ops.sgmv import Add
from peftkern.problem import DTYPES, TritonWay
from peftkern.settings import current
from peftkern.testing import arguments as given
from peftkern.testing.bases import drawn

from .plan import COMPOSITION, DROPOUT_P, Candidate, Job

SCALING = 2.0
ADAPTERS = 64


@dataclass
class Inputs:
    """``arguments`` of the op, a NamedTuple, and where plain torch would have kept one a dropout ``mask``: one a copy."""

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
    drop = dict(dropout_p=DROPOUT_P, seed=seed) if job.dropout else {}
    numbers = dict(scaling=SCALING, **drop)
    A, B = small(R, K, scale=K**-0.5), small(N, R, scale=R**-0.5)

    def one() -> tuple:
        if job.op == "sgmv_add":
            return Add(normal(M, N), *_many(normal, small, M, N, K, R))
        weight = drawn(job.base, N, K, 0, device) if job.base else normal(N, K, scale=K**-0.5)
        if job.op == "lora_linear_fwd":
            return given.forward(normal(M, K), weight, A, B, **numbers)
        if job.op == "lora_linear_bwd":
            u = _normal(generator, device, torch.float32, M, R)
            return given.backward(normal(M, N), normal(M, K), u, None, weight, A, B, **numbers)
        if job.op == "lora_row_norm":
            return RowNorm([weight], "dense", A, B, SCALING)
        x, *rest = _many(normal, small, M, N, K, R)
        return MultiForward(x, *given.base(weight), N, None, *rest, None, None)

    masks = []
    if job.dropout and job.op == "lora_linear_bwd":
        masks = [torch.empty(M, K, dtype=dtype, device=device).bernoulli_(1 - DROPOUT_P) for _ in range(count)]
    return Inputs(job, [one() for _ in range(count)], masks)


def _many(normal, small, M: int, N: int, K: int, R: int) -> tuple:
    # x, and what the ops take of adapters and route. Every copy has adapters of its own: they are most of what is read.
    from peftkern.many.route import route
    from peftkern.many.table import table_of

    x, count = normal(M, K), min(M, ADAPTERS)
    pairs = [(small(R, K, scale=K**-0.5), small(N, R, scale=R**-0.5), SCALING) for _ in range(count)]
    state = table_of(pairs, x, x.dtype)
    order, starts = route(torch.arange(M, device=x.device) % count, x, state)
    return x, list(state.weights), state.table, state.scaling, state.max_rank, order, starts


def call_of(candidate: Candidate, inputs: Inputs, arch: int) -> tuple[Callable[[int], object] | None, str | None]:
    """(the call on copy i, None), or (None, why this candidate cannot run here)."""
    job, arguments = inputs.job, inputs.arguments
    if candidate.name == COMPOSITION:
        return functools.partial(_composition, inputs), None
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
    return lambda i: function(arguments[i]), None


def _composition(inputs: Inputs, i: int) -> object:
    """The vendor's product and ``addmm_`` in the dtype of x, as in addmm.py, pass by pass."""
    c, dropout = inputs.arguments[i], inputs.job.dropout
    weight, keep = c.base[0], 1 - DROPOUT_P
    if inputs.job.op == "lora_linear_fwd":
        x = c.x
        A, B, dropped = c.lora_A.to(x.dtype), c.lora_B.to(x.dtype), x
        if dropout:
            dropped = x * torch.empty_like(x).bernoulli_(keep).div_(keep)
        return (x @ weight.t()).addmm_(dropped @ A.t(), B.t(), alpha=SCALING)
    dy, x, mask = c.dy, c.x, inputs.masks[i] if dropout else None
    A, B = c.lora_A.to(dy.dtype), c.lora_B.to(dy.dtype)
    du = (dy @ B).mul_(SCALING)
    dx = dy @ weight
    dx = dx.addcmul_(du @ A, mask, value=1 / keep) if dropout else dx.addmm_(du, A)
    # x stands for the dropped one, which plain torch keeps.
    dA, dB = du.t() @ x, (dy.t() @ c.u.to(dy.dtype)).mul_(SCALING)
    return dx, dA.to(c.lora_A.dtype), dB.to(c.lora_B.dtype)
