"""The benchmark of ``bottleneck_adapter``: an adapter of the residual stream, gelu between its products, with both biases.

Providers: the two products alone, frozen (base); the order of torch operations of AdapterHub's module, with the matrices in
their own dtype; peftkern. K and N are the width of the stream, R is that of the bottleneck. On a CPU, without dropout, also a
batch of sequences with eight adapters whose widths are not alike and R on the average, side by side as AdapterHub's BatchSplit
has them: its order of operations, a loop over adapters, and ``multi_bottleneck_adapter``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import peftkern

from ..core.bench import Bench
from ..core.case import BASE, FP32_BASE, Case, Floor, Provider, Step
from ..core.presets import Entry
from ..peers import check as peer_check
from ..peers.data import SCALING, Data, make_data

SHAPES = [((1024, 768, 768), 48), ((2048, 1024, 1024), 64), ((2048, 4096, 4096), 256)]
PRESETS = {
    "quick": tuple(Entry(*shape, R=(R,), adapter_dtypes=("fp32",), dropouts=(0.0,)) for shape, R in SHAPES[:2]),
    "full": tuple(Entry(*shape, R=(R,), adapter_dtypes=("fp32", "same"), dropouts=(0.0, 0.1)) for shape, R in SHAPES),
    "gpu": tuple(Entry(*shape, R=(R,), adapter_dtypes=("fp32", "same"), dropouts=(0.0,)) for shape, R in SHAPES),
}

SEQUENCES = 16
# The width of each adapter of a batch, in quarters of R.
WIDTHS = (1, 2, 3, 4, 4, 6, 6, 6)


def widths(R: int) -> list[int]:
    """Of the adapters of a batch."""
    return [max(1, R * quarters // 4) for quarters in WIDTHS]


def _parameters(case: Case, data: Data) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    down, up = data.adapters(case.R, case.adapter_dtype)
    if "biases" not in data.made:
        data.made["biases"] = {}
    biases = data.made["biases"].setdefault(
        (case.R, case.adapter_dtype),
        tuple(down.new_full((size,), 0.1).requires_grad_() for size in (case.R, case.N)),
    )
    return down, up, *biases


def _base(case: Case, data: Data) -> Step:
    down, up = (t.detach().to(data.x[0].dtype) for t in data.adapters(case.R, case.adapter_dtype))
    return Step(lambda i: F.linear(F.linear(data.x[i], down), up), [[x] for x in data.x], data.dy, [down, up])


def _eager(case: Case, data: Data) -> Step:
    leaves = _parameters(case, data)
    return Step(lambda i: _stock(data.x[i], leaves, case.dropout), [[x, *leaves] for x in data.x], data.dy, leaves)


def _stock(x: Tensor, parameters: tuple[Tensor, Tensor, Tensor, Tensor], dropout: float) -> Tensor:
    down, up, down_bias, up_bias = parameters
    z = F.gelu(F.linear(x.to(down.dtype), down, down_bias))
    o = F.linear(z, up, up_bias) * SCALING
    return (x + F.dropout(o, dropout, dropout > 0.0)).to(x.dtype)


def _ours(case: Case, data: Data) -> Step:
    down, up, down_bias, up_bias = leaves = _parameters(case, data)

    def forward(i: int) -> Tensor:
        return peftkern.bottleneck_adapter(
            data.x[i], down, up, down_bias=down_bias, up_bias=up_bias, activation="gelu", scaling=SCALING,
            dropout_p=case.dropout, training=True,
        )  # fmt: skip

    return Step(forward, [[x, *leaves] for x in data.x], data.dy, leaves)


def _several(case: Case, data: Data) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """The parameters of the adapters of a batch, as ``_parameters``: parts of those of a wide one."""
    key = ("several", case.R, case.adapter_dtype)
    if key not in data.made:
        own = widths(case.R)
        down, up = (t.detach() for t in data.adapters(sum(own), case.adapter_dtype))
        data.made[key] = [
            tuple(t.contiguous().requires_grad_() for t in (*pair, *(pair[0].new_full((n,), 0.1) for n in (R, case.N))))
            for *pair, R in zip(down.split(own), up.split(own, 1), own)
        ]
    return data.made[key]


def _loop(case: Case, data: Data) -> Step:
    each = _several(case, data)

    def forward(i: int) -> Tensor:
        parts = data.x[i].chunk(len(each))
        return torch.cat([_stock(x, parameters, 0.0) for x, parameters in zip(parts, each, strict=True)])

    return _of_all(forward, each, data)


def _many(case: Case, data: Data) -> Step:
    each = _several(case, data)
    adapters = [
        peftkern.Bottleneck(down, up, *biases, activation="gelu", scaling=SCALING) for down, up, *biases in each
    ]
    ids = torch.arange(SEQUENCES) * len(each) // SEQUENCES

    def forward(i: int) -> Tensor:
        return peftkern.multi_bottleneck_adapter(data.x[i].view(SEQUENCES, -1, case.K), adapters, ids).flatten(0, 1)

    return _of_all(forward, each, data)


def _of_all(forward: Callable[[int], Tensor], each: list[tuple[Tensor, ...]], data: Data) -> Step:
    leaves = [t for parameters in each for t in parameters]
    return Step(forward, [[x, *leaves] for x in data.x], data.dy, leaves)


def floor(case: Case, which: str) -> Floor:
    """The products of a pass; of bytes h and y, in backward dy, h and dh, and what belongs to the parameters."""
    product, stream = 2.0 * case.M * case.R * (case.K + case.N), case.dtype.itemsize * case.M * (case.K + case.N)
    matrices = case.adapter_dtype.itemsize * case.R * (case.K + case.N)
    if which == "fwd":
        return Floor(product, 0.0, float(stream + matrices), 0.0)
    return Floor(2 * product, product, float(2 * stream + 2 * matrices), float(stream / 2 + matrices))


def plan(case: Case, preset: str) -> list[str]:
    """The providers of a case."""
    several = case.device == "cpu" and not case.dropout and case.adapter_dtype == case.dtype and not case.M % SEQUENCES
    return ["eager", "peftkern", *(["loop", "peftkern_many"] if several else [])]


def gate(case: Case) -> str | None:
    """Why peftkern's result for this kind of case is wrong, or None. Checked at a smaller size against fp64."""
    from peftkern.testing.accuracy import check
    from peftkern.testing.bottleneck_problems import BottleneckProblem

    width = min(case.K, 512)
    problem = BottleneckProblem(
        seed=1, M=min(case.M, 192), K=width, N=width, R=case.R, dtype=case.dtype, adapter_dtype=case.adapter_dtype,
        activation="gelu", factor=SCALING, dropout_p=case.dropout, options=("down_bias", "up_bias"),
    )  # fmt: skip
    bad = [f"{row.output} {row.ratio:.2f}x" for row in check(problem, case.device) if not row.ok]
    return f"failed the accuracy check ({', '.join(bad)} of the error bound)" if bad else None


def check(provider: Provider, case: Case) -> str | None:
    """Why a result of another provider is wrong, or None: of many adapters, at a small size, against torch's steps in fp64."""
    if provider.name != "peftkern_many":
        return None
    sizes = dict(M=4 * SEQUENCES, K=96, N=96, R=min(case.R, 16))
    exact = dataclasses.replace(case, **sizes, dtype=torch.float64, adapter_dtype=torch.float64)
    step = _loop(exact, make_data(exact, 1))
    y = step.forward(0)
    small = dataclasses.replace(case, **sizes)
    return peer_check.wrong(
        provider.build(small, make_data(small, 1)), [y.detach(), *torch.autograd.grad(y, step.leaves[0], step.dy[0])]
    )


PROVIDERS = {
    p.name: p
    for p in (
        Provider(BASE, "two frozen products", _base),
        Provider(FP32_BASE, "two frozen products, fp32", lambda case, data: _base(case, data.as_fp32())),
        Provider("eager", "AdapterHub's order of operations", _eager),
        Provider("peftkern", "peftkern", _ours, gated=True),
        Provider("loop", "loop over 8 adapters", _loop, probe_as="eager"),
        Provider("peftkern_many", "peftkern, 8 adapters", _many, probe_as="peftkern"),
    )
}

BENCH = Bench("bottleneck_adapter", PROVIDERS, PRESETS, make_data, plan, gate, floor=floor, check=check)
