"""The benchmark of ``multi_lora_linear`` and ``sgmv``: populations, providers, and what each is timed on.

Decoding (up to 256 rows) is a forward pass without gradients, training (more rows) both passes. Providers: the frozen
nn.Linear; peftkern's own base product; a loop over adapters, gather + einsum and grouped_mm in plain PyTorch
(peers/many.py); shrink and expand over padded adapters (peers/padded.py, Triton); HF PEFT's ``adapter_names``; PolyLoRA, where
it is installed (peers/polylora.py); peftkern with a list of adapters, which trains, and with an AdapterBank, which serves.
``sgmv`` (of a bank), ``sgmv_list`` (of a list, which every call checks anew), ``sgmv_add`` (into an output that is there) and
names that end in ``_branch`` are the branch alone, without the frozen linear: their ``bytes_bound_fraction`` counts the adapters
in use, x and y, and their ``ratio_to_base`` is what the branch would add to a linear layer. ``copy`` is the large copy that is
the measure of bandwidth. On a GPU, each back end is a provider of its own besides (peers/candidates.py), and so is its base
product over weights in codes: ``bytes_bound_fraction`` then counts the codes.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import peftkern
from peftkern.backends.cpu import native as cpu_native
from peftkern.bases.base import base_of, kind_of

from ..core.bench import Bench, View
from ..core.case import BASE, COPY, FP32_BASE, OWN_BASE, Case, Floor, Provider, Step
from ..core.floor import add_floor, branch_floor
from ..core.populations import adapter_ranks
from ..core.presets import Entry
from ..judge.figures import missed
from ..judge.multi_lora_linear import figures
from ..peers import candidates, hf_peft, padded, polylora
from ..peers import check as peer_check
from ..peers.many import Gather, Grouped, Loop, no_grouped_mm, ungrouped
from ..peers.many_data import MultiData, copies, make_data

FORWARD = ("fwd",)


def _entry(M: int, adapters: int, mix: str = "uniform", base_share: float = 0.0, **more) -> Entry:
    return Entry(M, adapters=adapters, mix=mix, base_share=base_share, **more)


BOTH = ("fp32", "same")

QUICK = (
    _entry(32, 32, "distinct"),
    _entry(32, 1),
    _entry(256, 32, "zipf", 0.5, ranks="mixed", R=(64,)),
    _entry(512, 8),
    _entry(512, 8, base_share=1.0),
    _entry(2048, 8),
)

FULL = (
    # Decoding: rows that all differ; from one adapter to many; populations; base rows; ranks; a wide layer.
    *(_entry(M, M, "distinct") for M in (1, 4, 16, 32, 64, 128, 256)),
    *(_entry(32, count) for count in (1, 2, 4, 8, 16)),
    *(_entry(32, 32, mix) for mix in ("zipf", "skewed", "identical")),
    *(_entry(32, 32, "distinct", share) for share in (0.5, 1.0)),
    _entry(32, 32, "distinct", ranks="mixed", R=(64,)),
    _entry(32, 32, "distinct", N=14336),
    _entry(32, 32, "distinct", K=3072, N=3072),
    # Prefill and training.
    *(_entry(512, count) for count in (1, 2, 4, 16, 32, 64)),
    _entry(512, 8, adapter_dtypes=BOTH, dropouts=(0.0, 0.1)),
    *(_entry(512, 8, mix) for mix in ("zipf", "skewed", "identical")),
    *(_entry(512, 8, base_share=share) for share in (0.5, 1.0)),
    _entry(512, 8, ranks="mixed", R=(64,)),
    _entry(2048, 8, adapter_dtypes=BOTH),
    _entry(2048, 8, "zipf", 0.5, ranks="mixed", R=(64,)),
)

# What a GPU is judged on, and what lies around it. bf16 alone.
GPU = (
    _entry(64, 64, "distinct", adapter_dtypes=BOTH),
    _entry(64, 64, "distinct", N=14336),
    _entry(64, 8),
    _entry(64, 1),
    _entry(64, 64, "distinct", 0.5),
    _entry(64, 64, "distinct", ranks="mixed", R=(64,)),
    _entry(8 * 512, 8, "sorted", adapter_dtypes=BOTH),
)

PRESETS = {"quick": QUICK, "full": FULL, "gpu": GPU}


def _step(case: Case, data: MultiData, forward, leaves=None, frozen=(), *, grad: bool = True) -> Step:
    # ``forward(x, weight, i)``; ``leaves(i)`` besides x. Decoding, and what only serves, runs without gradients.
    def call(i: int) -> Tensor:
        with torch.set_grad_enabled(grad and case.phase != "decode"):
            return forward(data.x[i % len(data.x)], data.weight[i % len(data.weight)], i)

    every = range(data.copies)
    mine = [[data.x[i % len(data.x)], *(leaves(i) if leaves else ())] for i in every]
    weights = [t for weight in data.weight for t in base_of(weight).tensors]
    return Step(call, mine, [data.dy[i % len(data.dy)] for i in every], [*weights, *frozen])


def _base(case: Case, data: MultiData) -> Step:
    return _step(case, data, lambda x, weight, i: F.linear(x, weight))


def _own_base(case: Case, data: MultiData) -> Step:
    # lora_linear at rank 0: its base product and nothing else.
    empty = data.x[0].new_empty
    A, B = empty((0, case.K)), empty((case.N, 0))
    return _step(case, data, lambda x, weight, i: peftkern.lora_linear(x, weight, A, B))


def _no_extension() -> str | None:
    return "the C++ extension is not built: peftkern has no base product of its own" if cpu_native._C is None else None


def _copied(case: Case, which: str = "fwd") -> Floor:
    # As large as lora_linear's measure of bandwidth needs to be: beyond every cache. Small layers get a small one.
    size = 1 << 20
    if case.K * case.N * case.dtype.itemsize >= 1 << 20:
        size = 512 << 20 if case.device == "cuda" else 64 << 20
    return Floor(0.0, 0.0, 0.0, 2.0 * size)


def _copy(case: Case, data: MultiData) -> Step:
    source = torch.ones(int(_copied(case).branch_bytes) // 8, device=case.device)
    target = torch.empty_like(source)
    return _step(case, data, lambda x, weight, i: target.copy_(source), grad=False)


def _peer(kind: Callable, *, branch: bool = False) -> Callable[[Case, MultiData], Step]:
    def build(case: Case, data: MultiData) -> Step:
        peer = kind(data, case.adapter_dtype, case.dropout)

        def forward(x: Tensor, weight: Tensor, i: int) -> Tensor:
            y = x.new_zeros((case.M, case.N)) if branch else F.linear(x, weight)
            return peer.add(y, x, i)

        frozen = [t for i in range(data.copies) for t in peer.leaves(i)]
        return _step(case, data, forward, peer.used, frozen, grad=peer.trains)

    return build


def _peft(case: Case, data: MultiData) -> Step:
    layer = hf_peft.ManyLayer(data, case.adapter_dtype)
    return _step(case, data, lambda x, weight, i: layer.forward(x, i), grad=False)


def _polylora(case: Case, data: MultiData) -> Step:
    layer = polylora.PolyLayer(data, case.adapter_dtype)
    return _step(case, data, lambda x, weight, i: layer.forward(x, i), grad=False)


def _list(case: Case, data: MultiData) -> Step:
    lists = data.lists(case.adapter_dtype)
    flat = [[t for adapter in adapters for t in adapter[:2]] for adapters in lists]

    def forward(x: Tensor, weight: Tensor, i: int) -> Tensor:
        return peftkern.multi_lora_linear(x, weight, lists[i], data.ids, dropout_p=case.dropout, training=True)

    return _step(case, data, forward, flat.__getitem__, [t for part in flat for t in part])


def _bank(case: Case, data: MultiData) -> Step:
    bank, ids = data.bank(case.adapter_dtype)
    return _step(
        case, data, lambda x, weight, i: peftkern.multi_lora_linear(x, weight, bank, ids[i]), grad=False
    )  # fmt: skip


def _sgmv(case: Case, data: MultiData) -> Step:
    bank, ids = data.bank(case.adapter_dtype)
    return _step(case, data, lambda x, weight, i: peftkern.sgmv(x, bank, ids[i]), grad=False)


def _sgmv_list(case: Case, data: MultiData) -> Step:
    lists = data.lists(case.adapter_dtype)
    return _step(case, data, lambda x, weight, i: peftkern.sgmv(x, lists[i], data.ids), grad=False)


def _sgmv_add(case: Case, data: MultiData) -> Step:
    bank, ids = data.bank(case.adapter_dtype)
    out = [data.x[0].new_zeros((case.M, case.N)) for _ in range(data.copies)]
    return _step(case, data, lambda x, weight, i: peftkern.sgmv(x, bank, ids[i], out=out[i]), grad=False)


ROUTE, FWD = "multi_lora_linear_route", "multi_lora_linear_fwd"
TRAINING = (ROUTE, FWD, "multi_lora_linear_bwd")
# peftkern's own, and what each asks of a back end.
OURS = {
    "peftkern": (Provider("peftkern", "peftkern list", _list, gated=True), TRAINING),
    "peftkern_bank": (
        Provider("peftkern_bank", "peftkern bank", _bank, passes=FORWARD, gated=True),
        (ROUTE, FWD),
    ),
    "sgmv": (Provider("sgmv", "sgmv", _sgmv, passes=FORWARD, gated=True, floor=branch_floor), (ROUTE, "sgmv_add")),
    "sgmv_add": (
        Provider("sgmv_add", "sgmv, in place", _sgmv_add, passes=FORWARD, gated=True, floor=add_floor),
        (ROUTE, "sgmv_add"),
    ),
}


def _over_codes() -> list[Provider]:
    # Of a base in 4 bits: its product alone, and with adapters.
    dense = [Provider(OWN_BASE, "own base", _own_base), OURS["peftkern"][0], OURS["peftkern_bank"][0]]
    return [
        Provider(
            f"{p.name}_nf4", f"{p.title}, NF4", lambda case, data, build=p.build: build(case, data.over("nf4")),
            _no_extension, passes=FORWARD, gated=True,
        ) for p in dense
    ]  # fmt: skip


# Kinds of codes whose base product a GPU is timed on, forward: bytes of an element with its share of a scale.
CODED = {"nf4": 0.5 + 4 / 64, "int8": 1.0}


def _codes_floor(kind: str, case: Case, which: str) -> Floor:
    moved = CODED[kind] * case.K * case.N + case.dtype.itemsize * case.M * (case.K + case.N)
    return Floor(2.0 * case.M * case.K * case.N, 0.0, moved, 0.0)


def _forced_over_codes() -> dict[str, Provider]:
    # Of each back end that decodes in its product.
    def provider(kind: str, way: candidates.Candidate) -> Provider:
        return Provider(
            f"{OWN_BASE}_{kind}_{way.suffix}", f"own base, {kind}: {way.title}",
            lambda case, data: _own_base(case, data.over(kind)), passes=FORWARD,
            floor=functools.partial(_codes_floor, kind), around=functools.partial(candidates.active, way),
            unusable=candidates.unusable(way, ("lora_linear_fwd",), kind),
        )  # fmt: skip

    return {p.name: p for p in (provider(kind, way) for kind in CODED for way in candidates.CODED)}


def _forced() -> list[Provider]:
    return [
        dataclasses.replace(
            provider, name=f"{provider.name}_{way.suffix}", title=f"{provider.title}: {way.title}",
            unusable=candidates.unusable(way, ops if way.only else ops[1:2]), around=functools.partial(candidates.active, way),
        )
        for provider, ops in OURS.values() if provider.name != "sgmv" for way in candidates.MULTI
    ]  # fmt: skip


_NO_GRAPH = "its indices are lists, which the host copies to the GPU in every call"
PROVIDERS = {
    p.name: p
    for p in (
        Provider(BASE, "frozen linear", _base),
        Provider(FP32_BASE, "frozen linear, fp32", lambda case, data: _base(case, data.as_fp32())),
        Provider(OWN_BASE, "own base", _own_base, _no_extension),
        Provider(COPY, "copy", _copy, passes=FORWARD, floor=_copied),
        Provider("loop", "loop", _peer(Loop)),
        Provider("gather", "gather + einsum", _peer(Gather), passes=FORWARD),
        Provider("grouped_mm", "grouped mm", _peer(Grouped), no_grouped_mm, unusable=ungrouped),
        Provider("padded", "padded stack", _peer(padded.Padded), passes=FORWARD, unusable=padded.unusable),
        Provider("peft", "PEFT adapter names", _peft, hf_peft.missing, passes=FORWARD, no_graph=_NO_GRAPH),
        Provider("polylora", "PolyLoRA", _polylora, polylora.missing, passes=FORWARD,
                 unusable=polylora.unusable, no_graph=polylora.NO_GRAPH),
        *(provider for provider, _ in OURS.values()),
        *_over_codes(),
        *_forced(),
        *_forced_over_codes().values(),
        Provider("sgmv_list", "sgmv, list", _sgmv_list, passes=FORWARD, gated=True, floor=branch_floor),
        Provider("loop_branch", "loop", _peer(Loop, branch=True), passes=FORWARD, floor=branch_floor),
        Provider("gather_branch", "gather + einsum", _peer(Gather, branch=True), passes=FORWARD, floor=branch_floor),
        Provider("grouped_mm_branch", "grouped mm", _peer(Grouped, branch=True), no_grouped_mm, passes=FORWARD,
                 floor=branch_floor, unusable=ungrouped),
        Provider("padded_branch", "padded stack", _peer(padded.Padded, branch=True), passes=FORWARD,
                 floor=branch_floor, unusable=padded.unusable),
    )
}  # fmt: skip


def plan(case: Case, preset: str) -> list[str]:
    """The providers of a case: fewer where many rows take a quick run's time, or where there is no branch."""
    if case.device == "cuda":
        return _plan_gpu(case)
    names = [OWN_BASE, COPY]
    grouped = ["grouped_mm"] if _takes_grouped(case) else []
    if case.base_share == 1.0:
        return [*names, "peftkern", *([] if case.dropout else ["peftkern_bank"])]
    if case.dropout:
        return [*names, "loop", *grouped, "peftkern"]
    if case.phase == "training":
        if case.M > 512:
            return [*names, *(["loop", *grouped] if preset == "full" else []), "peftkern"]
        return [*names, "loop", "gather", *grouped, "peft", "peftkern", "peftkern_bank"]
    branches = ["sgmv", "sgmv_list", "gather_branch"]
    if preset == "full":
        branches += ["loop_branch", *(f"{g}_branch" for g in grouped)]
    return [*names, "loop", "gather", *grouped, "peft", "polylora", "peftkern", "peftkern_bank", *branches]


def _plan_gpu(case: Case) -> list[str]:
    grouped = ["grouped_mm"] if _takes_grouped(case) else []
    forced = [provider.name for provider in _forced()]
    peers = ["loop", *grouped, "padded", "peft"]
    if case.phase == "training":
        return [COPY, *peers, "peftkern", "peftkern_bank", *(n for n in forced if not n.startswith("sgmv"))]
    branches = [*(f"{g}_branch" for g in grouped), "padded_branch", "gather_branch"]
    # The base product over codes alone depends on rows and sizes, not on the population.
    coded = _forced_over_codes() if case.mix == "distinct" and case.base_share == 0.0 and case.ranks == "same" else ()
    return [COPY, *peers, "polylora", "gather", *OURS, *forced, *coded, *branches]


def _takes_grouped(case: Case) -> bool:
    # Strides of 16 bytes everywhere, and bf16 alone on a GPU.
    aligned = case.K % 8 == 0 and case.N % 8 == 0
    return aligned and (case.device == "cpu" or case.adapter_dtype == case.dtype == torch.bfloat16)


def gate(case: Case) -> str | None:
    """Why a result of peftkern's for this kind of case is wrong, or None: list, bank, and the branch of both, against fp64."""
    from peftkern.testing.accuracy import check
    from peftkern.testing.multi_problems import MultiLoRALinearProblem

    count = min(case.adapters, 12)
    mix = {"identical": "one", "skewed": "skewed", "sorted": "sorted"}.get(case.mix, "uniform")
    weights = frozenset(f"{m}{i}" for i in range(count) for m in "AB")
    listed = MultiLoRALinearProblem(
        seed=1, M=min(case.M, 192), K=min(case.K, 512), N=min(case.N, 512),
        ranks=adapter_ranks(case.ranks, case.R, count), dtype=case.dtype, adapter_dtype=case.adapter_dtype,
        scalings=(2.0,) * count, dropout_p=(case.dropout,) * count, mix="base" if case.base_share == 1.0 else mix,
        base_share=case.base_share, frozen=weights | {"x"} if case.phase == "decode" else frozenset(),
    )  # fmt: skip
    bank = dataclasses.replace(listed, bank=True, dropout_p=(0.0,) * count, frozen=weights | {"x"})
    branches = {
        "sgmv": dataclasses.replace(bank, branch=True),
        "sgmv, list": dataclasses.replace(bank, bank=False, branch=True),
    }
    for name, problem in {"list": listed, "bank": bank, **branches}.items():
        bad = [f"{row.output} {row.ratio:.2f}x" for row in check(problem, case.device) if not row.ok]
        if bad:
            return f"failed the accuracy check ({name}: {', '.join(bad)} of the error bound)"
    return None


def check(provider: Provider, case: Case) -> str | None:
    """Why a peer's result for this kind of case is wrong, or None: y at a small size, against fp64."""
    count = min(case.adapters, 12)
    small = dataclasses.replace(case, M=max(count, 24), K=96, N=80, adapters=count, dropout=0.0)
    data = make_data(small, 1)
    x, y = data.x[0].detach().double(), torch.zeros(small.M, small.N, dtype=torch.float64, device=case.device)
    for a, (A, B, s) in enumerate(data.lists(case.adapter_dtype)[0]):
        rows = (data.ids == a).nonzero()[:, 0]
        y[rows] = s * (x[rows] @ A.detach().double().t()) @ B.detach().double().t()
    if provider.floor is None:
        y += x @ data.weight[0].double().t()
    step = provider.build(small, data)
    for kind in (kind for kind in CODED if provider.name.startswith(f"{OWN_BASE}_{kind}")):
        coded = base_of(data.over(kind).weight[0])
        y = x @ kind_of(kind).dequantise(coded.tensors, torch.float64, (small.N, small.K)).t()
    return peer_check.wrong(step, [y])


BENCH = Bench(
    "multi_lora_linear", PROVIDERS, PRESETS, make_data, plan, gate, copies=copies, check=check, judge=figures,
    views={"missed": View(lambda result: missed(figures(result)))},
)  # fmt: skip
