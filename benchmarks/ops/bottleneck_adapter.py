"""The benchmark of ``bottleneck_adapter``: an adapter of the residual stream, gelu between its products, with both biases.

Providers: the two products alone, frozen (base); the order of torch operations of AdapterHub's module, with the matrices in
their own dtype; peftkern. K and N are the width of the stream, R is that of the bottleneck.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

import peftkern

from ..core.bench import Bench
from ..core.case import BASE, FP32_BASE, Case, Floor, Provider, Step
from ..core.presets import Entry
from ..peers.data import SCALING, Data, make_data

SHAPES = [((1024, 768, 768), 48), ((2048, 1024, 1024), 64), ((2048, 4096, 4096), 256)]
PRESETS = {
    "quick": tuple(Entry(*shape, R=(R,), adapter_dtypes=("fp32",), dropouts=(0.0,)) for shape, R in SHAPES[:2]),
    "full": tuple(Entry(*shape, R=(R,), adapter_dtypes=("fp32", "same"), dropouts=(0.0, 0.1)) for shape, R in SHAPES),
    "gpu": tuple(Entry(*shape, R=(R,), adapter_dtypes=("fp32", "same"), dropouts=(0.0,)) for shape, R in SHAPES),
}


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
    down, up, down_bias, up_bias = leaves = _parameters(case, data)

    def forward(i: int) -> Tensor:
        z = F.gelu(F.linear(data.x[i].to(down.dtype), down, down_bias))
        o = F.linear(z, up, up_bias) * SCALING
        return (data.x[i] + F.dropout(o, case.dropout, case.dropout > 0.0)).to(data.x[i].dtype)

    return Step(forward, [[x, *leaves] for x in data.x], data.dy, leaves)


def _ours(case: Case, data: Data) -> Step:
    down, up, down_bias, up_bias = leaves = _parameters(case, data)

    def forward(i: int) -> Tensor:
        return peftkern.bottleneck_adapter(
            data.x[i], down, up, down_bias=down_bias, up_bias=up_bias, activation="gelu", scaling=SCALING,
            dropout_p=case.dropout, training=True,
        )  # fmt: skip

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
    return ["eager", "peftkern"]


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


PROVIDERS = {
    p.name: p
    for p in (
        Provider(BASE, "two frozen products", _base),
        Provider(FP32_BASE, "two frozen products, fp32", lambda case, data: _base(case, data.as_fp32())),
        Provider("eager", "AdapterHub's order of operations", _eager),
        Provider("peftkern", "peftkern", _ours, gated=True),
    )
}

BENCH = Bench("bottleneck_adapter", PROVIDERS, PRESETS, make_data, plan, gate, floor=floor)
