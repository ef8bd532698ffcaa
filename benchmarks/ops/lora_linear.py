"""The benchmark of ``lora_linear``: shapes, providers, and what each is timed on.

Providers: the frozen nn.Linear in the activation's dtype and in fp32; HF PEFT as users run it (fp32 adapters on any
base), with adapters in the base's dtype, and under torch.compile (peers/hf_peft.py); the ``addmm_`` function
(peers/addmm.py) and the split of the graph at the rank-sized products (peers/split.py), two published designs; peftkern, and
on a GPU each of its ways (peers/candidates.py).
"""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch import Tensor

import peftkern

from ..core.bench import Bench, View
from ..core.case import Case, Provider, Step
from ..core.presets import Entry
from ..judge.figures import missed
from ..judge.lora_linear import figures
from ..peers import candidates, hf_peft
from ..peers import check as peer_check
from ..peers.addmm import addmm_lora
from ..peers.data import BASES, SCALING, Data, copies, make_data
from ..peers.split import split_lora
from ..tables.ways import ways

OPS = ("lora_linear_fwd", "lora_linear_bwd")
DROPOUTS, BOTH = (0.0, 0.1), ("fp32", "same")
QUICK = [(512, 1024, 1024), (1024, 2048, 2048), (16, 4096, 4096)]
FULL = [(512, 1024, 1024), (2048, 1024, 1024), (2048, 4096, 4096), (1024, 4096, 14336), (1024, 14336, 4096),
        (16, 4096, 4096), (1, 4096, 4096)]  # fmt: skip
# What the limits for machines with a slow half-precision product are stated on, besides the shapes above.
HALF_EXTRA = [(192, 768, 1024), (4, 4096, 4096)]
GPU = [(M, 4096, N) for M in (8192, 2048, 512) for N in (4096, 14336)]
PRESETS = {
    "quick": tuple(Entry(*shape, adapter_dtypes=("fp32",), dropouts=DROPOUTS) for shape in QUICK),
    "full": (
        *(Entry(*shape, R=(8, 16, 64), adapter_dtypes=BOTH, dropouts=DROPOUTS) for shape in FULL),
        *(Entry(*shape, adapter_dtypes=BOTH, dropouts=DROPOUTS, dtypes=("bf16", "fp16")) for shape in HALF_EXTRA),
    ),
    "gpu": tuple(Entry(*shape, adapter_dtypes=BOTH, dropouts=DROPOUTS) for shape in GPU),
}


def _addmm(case: Case, data: Data) -> Step:
    A, B = data.adapters(case.R, case.adapter_dtype)
    leaves = [[x, A, B] for x in data.x]
    forward = lambda i: addmm_lora(data.x[i], data.weight[i], A, B, SCALING, case.dropout)  # noqa: E731
    return Step(forward, leaves, data.dy, [*data.weight, A, B])


def _split(case: Case, data: Data) -> Step:
    A, B = data.adapters(case.R, case.adapter_dtype)
    forward = lambda i: split_lora(data.x[i], data.weight[i], A, B, SCALING, case.dropout)  # noqa: E731
    return Step(forward, [[x, A, B] for x in data.x], data.dy, [*data.weight, A, B])


def _ours(case: Case, data: Data) -> Step:
    A, B = data.adapters(case.R, case.adapter_dtype)

    def forward(i: int) -> Tensor:
        return peftkern.lora_linear(
            data.x[i], data.weight[i], A, B, scaling=SCALING, dropout_p=case.dropout, training=True
        )

    return Step(forward, [[x, A, B] for x in data.x], data.dy, [*data.weight, A, B])


PROVIDERS = {
    p.name: p
    for p in (
        *BASES,
        Provider("peft", "PEFT", hf_peft.one, hf_peft.missing),
        Provider("peft_compile", "PEFT compiled", hf_peft.compiled, hf_peft.missing, probe_as="peft", warm_steps=2),
        Provider("addmm", "addmm_ function", _addmm),
        Provider("split", "split", _split),
        Provider("peftkern", "peftkern", _ours, gated=True),
        *(
            Provider(
                f"peftkern_{way.suffix}", f"peftkern: {way.title}", _ours, gated=True,
                unusable=candidates.unusable(way, OPS), around=functools.partial(candidates.active, way),
            )
            for way in candidates.LINEAR
        ),
    )
}  # fmt: skip


def plan(case: Case, preset: str) -> list[str]:
    """The providers of a case. PEFT, which R and the adapter's dtype hardly slow down, is left out where it says
    nothing new, so that a full run ends in a quarter of an hour; ``--provider`` asks for all of them."""
    if case.device == "cuda":
        # A compiler's minute for one case is enough.
        users = case.adapter_dtype == torch.float32 and case.dropout and case.shape == (8192, 4096, 4096)
        ways = [f"peftkern_{way.suffix}" for way in candidates.LINEAR]
        return ["peft", *(["peft_compile"] if users else []), "addmm", "split", "peftkern", *ways]
    names = ["addmm", "peftkern"]
    users = case.adapter_dtype == torch.float32
    big = case.M * case.K * case.N > 2**35
    if (users and case.R <= 16) or case.R == 16:
        names.insert(0, "peft")
    if users and case.R == 16 and case.dropout and not big and (preset == "full" or case.M == 512):
        names.insert(1, "peft_compile")
    return names


def gate(case: Case) -> str | None:
    """Why peftkern's result for this kind of case is wrong, or None. Checked at a smaller size against fp64."""
    from peftkern.testing.accuracy import check
    from peftkern.testing.problems import LoRALinearProblem

    problem = LoRALinearProblem(
        seed=1, M=min(case.M, 192), K=min(case.K, 1024), N=min(case.N, 1024), R=case.R, dtype=case.dtype,
        adapter_dtype=case.adapter_dtype, scaling=SCALING, dropout_p=case.dropout,
    )  # fmt: skip
    bad = [f"{row.output} {row.ratio:.2f}x" for row in check(problem, case.device) if not row.ok]
    return f"failed the accuracy check ({', '.join(bad)} of the error bound)" if bad else None


def check(provider: Provider, case: Case) -> str | None:
    """Why a peer's result for this kind of case is wrong, or None: at a small size, against fp64."""
    build = PROVIDERS[provider.probe_as or provider.name].build
    small = dataclasses.replace(case, M=48, K=160, N=96, dropout=0.0)
    data = make_data(small, 1)
    A, B = data.adapters(case.R, case.adapter_dtype)
    x, A, B = (t.detach().double().requires_grad_() for t in (data.x[0], A, B))
    branch = SCALING * (x @ A.t()) @ B.t()
    y = x @ data.weight[0].double().t() + branch
    exact = [y.detach(), *torch.autograd.grad(y, (x, A, B), data.dy[0].double())]
    reason = peer_check.wrong(build(small, data), exact)
    if reason or not case.dropout:
        return reason
    data.weight[0].zero_()
    # Each kept element of x is divided by 1 - p: the variance of its part in y is p / (1 - p) times its square.
    columns = (SCALING * B @ A).square().sum(0)
    variance = case.dropout / (1 - case.dropout) * (x.square() @ columns).sum().item()
    return peer_check.wrong_dropout(
        build(dataclasses.replace(case, M=48, K=160, N=96), data), branch.detach(), variance
    )


BENCH = Bench(
    "lora_linear", PROVIDERS, PRESETS, make_data, plan, gate, copies=copies, check=check, judge=figures,
    views={"missed": View(lambda result: missed(figures(result))), "ways": View(ways, of_gpus=True)},
)  # fmt: skip
