"""Every op, back end and dtype against fp64: random problems (those of ``peftkern verify``) and the sizes of models.

The worst error over its bound is recorded with each test, so that a report can rank what passed.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import peftkern
from peftkern.backends.cuda import lora_linear as cuda_lora
from peftkern.benchmarks.tune.plan import jobs
from peftkern.dispatch.choose import Declined, choose
from peftkern.problem import DTYPES
from peftkern.settings import current
from peftkern.testing.accuracy import check, judged
from peftkern.testing.equations import mm
from peftkern.testing.multi_problems import MultiLoRALinearProblem
from peftkern.testing.problems import LoRALinearProblem
from peftkern.verify import main as verify

# Problems of each op and dtype. Triton compiles anew for most of them.
COUNTS = {"cuda": 8, "reference": 3, "triton": 5, "auto": 1}
COMPILES = {"bottleneck_adapter": 2}  # at most, where a problem compiles a dozen kernels
# What the CUDA kernels leave to others: most of the problems that have it would only be declined.
ELSEWHERE = {"base_in_scale", "base_out_scale"}


def names(op: str, backend: str, dtype: str, count: int) -> list[str]:
    """The first problems of an op, for the CUDA kernels those that they may take."""
    found = verify.names(4 * count, [dtype], 500, large=False, op=op)
    if (op, backend) == ("lora_linear", "cuda"):
        found = [name for name in found if not ELSEWHERE & set(verify.named(name).options)]
    return found[:count]


RANDOM = [
    pytest.param(op, backend, name, id=f"{op}-{backend}-{name}")
    for op in ("lora_linear", "multi_lora_linear", "bottleneck_adapter")
    for backend, count in COUNTS.items()
    for dtype in DTYPES
    for name in names(op, backend, dtype, min(count, COMPILES.get(op, count)))
]


@pytest.mark.parametrize("op, backend, name", RANDOM)
def test_random_problem(op, backend, name, record_property):
    (target,) = verify.targets([backend], None, op, "cuda")
    if target.reason():
        pytest.skip(target.reason())
    with target.active():
        rows = verify.check_one(target, name)
    if rows[0]["output"] == verify.DECLINED:
        pytest.skip(f"declined: {rows[0]['error']}")
    _judge(rows, record_property)


def _judge(rows: list[dict], record_property) -> None:
    worst = max(rows, key=lambda r: float("inf") if r["ratio"] is None else r["ratio"])
    for key in ("backend", "problem", "dtype", "adapters", "output", "ratio"):
        record_property(key, worst[key])
    bad = [r["error"] or f"{r['output']}: {r['ratio']} of its bound" for r in rows if not r["ok"]]
    assert not bad, bad


# M, K, N, R: whole tiles, tails in each dimension that TMA can still take, few rows, wide ranks, a model's layer.
MODELS = [
    (1024, 1024, 2048, 16), (333, 1536, 1000, 8), (257, 520, 264, 64), (64, 4096, 4096, 16), (1, 4096, 1024, 16),
    (130, 64, 8, 128), (96, 200, 328, 200), (2048, 4096, 4096, 16),
]  # fmt: skip
COMPILED = MODELS[:3]
KINDS = [("fp32", 0.1), ("same", 0.1), ("fp32", 0.0), ("same", 0.0)]


@pytest.mark.parametrize("adapters, dropout", KINDS)
@pytest.mark.parametrize("sizes", MODELS, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_model_sizes(name, dtype, sizes, adapters, dropout, record_property):
    (target,) = verify.targets([name], None, "lora_linear", "cuda")
    if target.reason():
        pytest.skip(target.reason())
    M, K, N, R = sizes
    if name == "triton" and sizes not in COMPILED:
        pytest.skip("its random problems cover more, and each size is compiled anew")
    kind = DTYPES[dtype]
    problem = LoRALinearProblem(
        seed=M + R, M=M, K=K, N=N, R=R, dtype=kind, adapter_dtype=torch.float32 if adapters == "fp32" else kind,
        scaling=2.0, dropout_p=dropout, options=("bias",) if M % 2 else (),
    )  # fmt: skip
    with target.active():
        results = check(problem, "cuda")
    head = dict(backend=name, problem=f"{M}x{K}x{N} R={R} dropout={dropout:g}", dtype=dtype, adapters=adapters)
    _judge([head | dict(output=r.output, ratio=r.ratio, ok=r.ok, error=None) for r in results], record_property)


# Of each kind one, with the most to read.
EVERYTHING = frozenset({"x", "lora_A", "lora_B", "bias"})
CODED = (
    "nf4 nested", "fp4", "int8", "int4", "int4 signed", "hqq4", "quanto4", "fp8 by blocks", "mxfp4", "q4_0", "q8_0",
)  # fmt: skip


# What the CUDA kernels read of these, forward alone: whole runs of codes for few rows and more, and odd sizes.
READ = [
    ("cuda", name, (M, K, 264)) for name in ("nf4", *CODED) if name.split()[0] in cuda_lora.CODED
    for M, K in ((1, 4096), (9, 320), (40, 320), (40, 322))
]  # fmt: skip


@pytest.mark.parametrize(
    "backend, name, sizes", [*(("triton", name, (M, 320, 264)) for name in CODED for M in (40, 200)), *READ], ids=str
)
def test_weights_in_codes(backend, name, sizes, record_property):
    (target,) = verify.targets([backend], None, "lora_linear", "cuda")
    if target.reason():
        pytest.skip(target.reason())
    M, K, N = sizes
    problem = LoRALinearProblem(
        seed=M, M=M, K=K, N=N, R=16, dtype=torch.bfloat16, adapter_dtype=torch.float32, scaling=2.0, dropout_p=0.1,
        options=("bias",), base=name, frozen=EVERYTHING if backend == "cuda" else frozenset(),
    )  # fmt: skip
    with target.active():
        results = check(problem, "cuda")
    head = dict(backend=backend, problem=f"{name} {M}x{K}x{N}", dtype="bf16", adapters="fp32")
    _judge([head | dict(output=r.output, ratio=r.ratio, ok=r.ok, error=None) for r in results], record_property)


def test_the_cuda_kernels_take_what_users_train():
    """Otherwise the tests of them would test another back end."""
    (target,) = verify.targets(["cuda"], None, "lora_linear", "cuda")
    if target.reason():
        pytest.skip(target.reason())
    major, minor = torch.cuda.get_device_capability()
    with target.active():
        coded = [
            job for job in jobs("quantised", ranks=(16,)) if job.op == "lora_linear_fwd" and job.M <= cuda_lora.FEW_ROWS
        ]
        for job in [*jobs("lora_linear", ranks=(16, 64)), *coded]:
            choice = choose(job.problem(major * 10 + minor), current())
            assert choice.backend == "cuda", f"{job}: {choice.declined}"


@pytest.mark.parametrize("adapters", ["fp32", "same"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N, K, R", [(4096, 4096, 16), (333, 520, 8), (1, 1, 1), (1000, 1111, 65)])
def test_row_norm(backend, dtype, adapters, N, K, R, record_property):
    """Of W + s B A, judged as everything: by the error of the same in fp32."""
    kind = DTYPES[dtype]
    make = torch.Generator("cuda").manual_seed(K)
    small = torch.float32 if adapters == "fp32" else kind
    W, A, B = (
        torch.randn(*shape, generator=make, device="cuda").mul_(scale).to(d)
        for shape, scale, d in (((N, K), K**-0.5, kind), ((R, K), K**-0.5, small), ((N, R), R**-0.5, small))
    )
    reason = taker_is_another(backend, lambda: torch.ops.peftkern.lora_row_norm([W], "dense", A, B, 2.0))
    if reason:
        pytest.skip(reason)
    got = torch.ops.peftkern.lora_row_norm([W], "dense", A, B, 2.0)
    exact = torch.linalg.vector_norm(W.double() + 2.0 * (B.double() @ A.double()), dim=1)
    eager = torch.linalg.vector_norm(W.float() + 2.0 * (B.float() @ A.float()), dim=1)
    row = judged("norm", got, eager, exact, exact)
    head = dict(backend=backend, problem=f"{N}x{K} R={R}", dtype=dtype, adapters=adapters)
    _judge([head | dict(output="norm", ratio=row.ratio, ok=row.ok, error=None)], record_property)


def taker_is_another(backend: str, run) -> str | None:
    """Why a call of ``run`` was not taken by ``backend``, or None."""
    with verify.Takers() as mode:
        try:
            run()
        except Declined as error:
            return str(error).rpartition("]: ")[2]
    last = mode.taken[-1]
    return None if last.backend == backend else f"{last.backend} took it; {last.declined}"


# Vectors of the adapters of a batch, as methods have them.
METHODS = (
    ("base_out_scale", "delta_out_scale"), ("rank_scale", "delta_out_scale"), ("base_in_scale", "bias"), ("delta_in_scale",), (),
)  # fmt: skip


@pytest.mark.parametrize("adapters", ["fp32", "same"])
@pytest.mark.parametrize("sizes", [(40, 4096, 1024, 16), (1100, 264, 520, 24), (9, 333, 77, 130)], ids=str)
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_methods_in_a_batch(name, dtype, sizes, adapters, record_property):
    """Every kind of vector beside a plain adapter, in a bank; the output alone."""
    (target,) = verify.targets([name], None, "multi_lora_linear", "cuda")
    if target.reason():
        pytest.skip(target.reason())
    M, K, N, R = sizes
    kind, count = DTYPES[dtype], len(METHODS)
    ranks = tuple(max(1, R // (i + 1)) for i in range(count))
    problem = MultiLoRALinearProblem(
        seed=M, M=M, K=K, N=N, ranks=ranks, dtype=kind, adapter_dtype=torch.float32 if adapters == "fp32" else kind,
        scalings=(2.0,) * count, dropout_p=(0.0,) * count, base_share=0.2, bias=True, bank=True, vectors=METHODS,
    )  # fmt: skip
    problem = replace(problem, frozen=frozenset(problem.tensors()))
    with target.active():
        results = check(problem, "cuda")
    head = dict(backend=name, problem=f"methods {M}x{K}x{N}", dtype=dtype, adapters=adapters)
    _judge([head | dict(output=r.output, ratio=r.ratio, ok=r.ok, error=None) for r in results], record_property)


# M rows, adapters, K, N, ranks.
BRANCHES = [
    (64, 64, 4096, 4096, (16,)),
    (64, 1, 4096, 1024, (64,)),
    (7, 3, 1000, 333, (1, 128, 5)),
    (700, 9, 520, 264, (8, 24, 16)),
]


@pytest.mark.parametrize("adapters", ["fp32", "same"])
@pytest.mark.parametrize("sizes", BRANCHES, ids=lambda s: "x".join(map(str, s[:4])))
@pytest.mark.parametrize("dtype", DTYPES)
def test_branch_in_place(backend, dtype, sizes, adapters, record_property):
    """sgmv into an output, as decoding calls it: with a bank, some rows without an adapter."""
    M, count, K, N, ranks = sizes
    kind = DTYPES[dtype]
    small = torch.float32 if adapters == "fp32" else kind
    got, exact, eager = branch(M, count, K, N, ranks, kind, small, "cuda", backend)
    if isinstance(got, str):
        pytest.skip(got)
    row = judged("y", got, eager, exact, exact)
    head = dict(backend=backend, problem=f"sgmv {M}x{K}x{N}, {count} adapters", dtype=dtype, adapters=adapters)
    _judge([head | dict(output="y", ratio=row.ratio, ok=row.ok, error=None)], record_property)


def branch(M, count, K, N, ranks, kind, small, device, backend):
    """(result, in fp64, in PEFT's order), or a reason why ``backend`` did not take it."""
    make = torch.Generator().manual_seed(M + K)

    def normal(*shape, scale=1.0, dtype=kind):
        return torch.randn(*shape, generator=make).mul_(scale).to(dtype).to(device)

    bank = peftkern.AdapterBank(K, N, max_adapters=count, max_rank=max(ranks), dtype=small, device=device)
    pairs = [
        (normal(r, K, scale=K**-0.5, dtype=small), normal(N, r, scale=r**-0.5, dtype=small), 0.5 + i)
        for i, r in ((i, ranks[i % len(ranks)]) for i in range(count))
    ]
    numbers = torch.tensor([*(bank.add(str(i), *p) for i, p in enumerate(pairs)), -1], device=device)
    which = torch.randperm(M, generator=make) % (count + (count < M))  # the last: no adapter
    x, y = normal(M, K), normal(M, N)
    got, exact, eager = y.clone(), y.double(), y.clone()
    with torch.inference_mode():
        reason = taker_is_another(backend, lambda: peftkern.sgmv(x, bank, numbers[which.to(device)], out=got))
    for i, (A, B, s) in enumerate(pairs):
        rows = (which == i).nonzero()[:, 0].to(device)
        exact[rows] += s * (x[rows].double() @ A.double().T @ B.double().T)
        delta = mm(mm(x[rows].to(small), A), B) * s
        eager[rows] = (y[rows] + delta).to(kind)
    return reason or got, exact, eager
