"""The CUDA back end from the ops' arguments to the kernels, run by the simulator on CPU tensors."""

from __future__ import annotations

import pytest
import torch

from peftkern import AdapterBank
from peftkern.backends import marshal
from peftkern.backends.cuda import OPS
from peftkern.backends.cuda import multi_lora_linear as cuda_multi
from peftkern.backends.cuda import native as cuda_native
from peftkern.ops.bottleneck_adapter import Bottleneck, BottleneckGrad
from peftkern.ops.dropout_mask import Mask, dropout_mask_ref
from peftkern.ops.lora_linear import lora_linear_bwd_ref, lora_linear_fwd_ref
from peftkern.ops.lora_row_norm import RowNorm, lora_row_norm_ref
from peftkern.ops.multi_lora_linear import MultiForward, Route, multi_lora_linear_fwd_ref, multi_lora_linear_route_ref
from peftkern.ops.sgmv import Add, sgmv_add_ref
from peftkern.problem import Problem
from peftkern.settings import current
from peftkern.testing.arguments import backward, base, forward
from peftkern.verify.static import cuda_launches


def test_dropout_mask(device):
    seed = torch.tensor([-5])
    assert torch.equal(OPS["dropout_mask"](Mask(seed, 5, 43, 0.3)), dropout_mask_ref(seed, 5, 43, 0.3))


# Vectors of the bank's adapters by name; those of the base, which sgmv does without.
OF_BRANCH = ({"rank_scale": 8, "delta_out_scale": 40}, {"delta_in_scale": 24})
OF_BASE = ({"base_in_scale": 24, "bias": 40}, {"base_out_scale": 40})


def batch(dtype, ids, ranks=(8, 3), max_rank=8, vectors=()):
    """(x, arguments of the branch, vectors and which act) of rows that take the bank's adapters "0", "1", ..., None for none.

    ``vectors``: sizes by name, for each adapter.
    """
    gen = torch.Generator().manual_seed(1)
    bank = AdapterBank(24, 40, max_adapters=len(ranks) + 1, max_rank=max_rank, dtype=dtype)
    for name, rank in enumerate(ranks):
        A, B = torch.randn(rank, 24, generator=gen), torch.randn(40, rank, generator=gen)
        own = vectors[name] if name < len(vectors) else {}
        own = {of: torch.randn(size, generator=gen) for of, size in own.items()}
        bank.add(str(name), A, B, 0.5 * name + bool(vectors), **own)
    state = bank.snapshot()
    order, starts = multi_lora_linear_route_ref(Route(bank.ids(ids), state.table, state.mask))
    x = torch.randn(len(ids), 24, generator=gen).to(dtype)
    rest = list(state.weights), state.table, state.scaling, state.max_rank, order, starts
    return x, rest, (list(state.vectors), state.acting)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vectors", [(), OF_BRANCH], ids=["plain", "vectors"])
def test_sgmv_add(device, dtype, vectors):
    x, rest, own = batch(dtype, ["1", None, "0", "1", "0"], vectors=vectors)
    out = torch.randn(5, 40, generator=torch.Generator().manual_seed(2)).to(dtype)
    expected = out.clone()
    sgmv_add_ref(Add(expected, x, *rest, *own))
    OPS["sgmv_add"](Add(out, x, *rest, *own))
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize(
    "arch, dtype, most",
    [("sm_80", torch.bfloat16, 10431), ("sm_86", torch.float16, 6335), ("sm_89", torch.float32, 6335),
     ("sm_90", torch.float32, 14527), ("sm_90", torch.bfloat16, 14527), ("sm_120", torch.bfloat16, 6335)],
)  # fmt: skip
def test_more_ranks_than_a_block_has_memory_for(sim, monkeypatch, arch, dtype, most):
    """Declined, where the launch would fail."""
    monkeypatch.setattr(cuda_native, "_C", sim.module)
    for rank, taken in ((1, True), (512, True), (513, True), (most, True), (most + 1, False), (2**31, False)):
        problem = Problem("sgmv_add", "cuda", arch, dtype, dtype, 6, 40, 24, rank, frozenset())
        reason = cuda_multi.decline(problem, current())
        assert reason is None if taken else "more shared memory than a block has" in reason


def test_every_launch_fits_the_devices_that_run_it():
    """99 KiB are what sm_86, sm_89 and sm_120 have; ``sim`` holds every launch of the tests against what is recorded."""
    for kernel, most in cuda_launches.recorded().items():
        assert most["shared"] <= (227 if kernel.startswith("hopper::") else 99) * 1024, kernel


@pytest.mark.parametrize("bias_dtype", [None, torch.bfloat16, torch.float32])
def test_many_adapters(device, bias_dtype):
    """The whole layer: u too, zeros in it where a row has no such rank, and a scaling of zero."""
    x, rest, _ = batch(torch.bfloat16, ["1", None, "2", "1", "0", None], ranks=(24, 3, 40), max_rank=64)
    if device < 90:
        problem = Problem(
            "multi_lora_linear_fwd", "cuda", "sm_80", x.dtype, x.dtype, 6, 40, 24, 64, frozenset({"base"})
        )
        assert "sm_90" in cuda_multi.decline(problem, current())
        return
    gen = torch.Generator().manual_seed(3)
    weight = torch.randn(40, 24, generator=gen).to(x.dtype)
    bias = None if bias_dtype is None else torch.randn(40, generator=gen).to(bias_dtype)
    c = MultiForward(x, *base(weight), 40, bias, *rest, None, None)
    y, u, _ = OPS["multi_lora_linear_fwd"](c)
    expected_y, expected_u, _ = multi_lora_linear_fwd_ref(c)
    torch.testing.assert_close(y, expected_y, rtol=2e-2, atol=4e-2)
    torch.testing.assert_close(u, expected_u, rtol=1e-5, atol=1e-5)
    assert (u[1] == 0).all() and (u[0, 3:] == 0).all() and (u[4, :24] != 0).all()


# Vectors of the adapters "0", "1" and "2".
METHODS = {
    "dora": ({"base_out_scale": 40, "delta_out_scale": 40}, {}, {"base_out_scale": 40}),
    "vera": ({"rank_scale": 24, "delta_out_scale": 40}, {"rank_scale": 3}),
    "ia3": ({"base_in_scale": 24}, {"base_out_scale": 40, "bias": 40}, {"delta_in_scale": 24}),
    "bias": ({}, {"bias": 40}),
}


@pytest.mark.parametrize("device", [90], indirect=True)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("save_base", [False, True])
@pytest.mark.parametrize("bias_dtype", [None, torch.float16, torch.float32])
def test_many_adapters_with_vectors(device, simulated, method, save_base, bias_dtype):
    """h comes back as a backward pass wants it; whatever acts, one call follows the product, and p_b takes one before."""
    ids = ["1", None, "2", "1", "0", None, "0"]
    x, rest, own = batch(torch.float16, ids, ranks=(24, 3, 40), max_rank=64, vectors=METHODS[method])
    gen = torch.Generator().manual_seed(3)
    weight = (torch.randn(40, 24, generator=gen) / 5).to(x.dtype)
    bias = None if bias_dtype is None else torch.randn(40, generator=gen).to(bias_dtype)
    c = MultiForward(x, *base(weight), 40, bias, *rest, None, None, *own, save_base)
    flags = frozenset({"base", *own[1].split()} | ({"save_base"} if save_base else set()))
    problem = Problem("multi_lora_linear_fwd", "cuda", "sm_90", x.dtype, x.dtype, 7, 40, 24, 64, flags)
    assert cuda_multi.decline(problem, current()) is None
    simulated.calls.clear()
    y, u, h = OPS["multi_lora_linear_fwd"](c)
    assert simulated.calls == ["cuda_scale_rows"] * (method == "ia3") + ["cuda_sgmv_add"]
    expected_y, expected_u, expected_h = multi_lora_linear_fwd_ref(double(c))
    # y has another rounding, that of the base product, and with a p_b that of what enters it.
    error = (y.double() - expected_y).abs()
    assert (error <= 2.0**-11 * (expected_y.abs() + 20)).all(), error.max()
    close(u, expected_u, torch.float32)
    if save_base:
        close(h, expected_h, x.dtype)
    else:
        assert h.numel() == 0


def close(got: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    """One rounding to ``dtype`` beside fp32 sums."""
    assert got.shape == expected.shape and got.dtype == dtype
    if expected.numel():
        unit = {torch.float32: 2e-5, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}[dtype]
        assert (got.double() - expected).abs().max() <= unit * expected.abs().max()


def double(value):
    """Arguments of an op with its tensors in fp64."""
    if isinstance(value, (list, tuple)):
        parts = map(double, value)
        return type(value)(*parts) if hasattr(value, "_fields") else list(parts)
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def check_gradients(c) -> None:
    """Of lora_linear, those that are needed; the others come back empty."""
    *got, vectors = OPS["lora_linear_bwd"](c)
    *expected, expected_vectors = lora_linear_bwd_ref(double(c))
    dtypes = (c.dy.dtype, c.lora_A.dtype, c.lora_B.dtype, *[torch.float32] * 6)
    for ours, right, dtype in zip([*got, *vectors], [*expected, *expected_vectors], dtypes, strict=True):
        close(ours, right, dtype)


HALVES = (torch.bfloat16, torch.float16)
# M, N, K, R; dtype; adapters in fp32; dropout; scale vectors; bias
LAYERS = [
    (70, 72, 136, 16, torch.bfloat16, True, True, False, False),
    (5, 33, 40, 3, torch.float16, True, False, True, True),
    (130, 264, 64, 33, torch.bfloat16, False, True, True, True),
    (1, 8, 8, 1, torch.float16, False, True, False, True),
    (33, 17, 29, 8, torch.bfloat16, True, True, True, False),
    (0, 16, 24, 4, torch.bfloat16, True, False, False, True),
    (9, 16, 24, 0, torch.bfloat16, True, False, False, True),
    (20, 72, 64, 80, torch.bfloat16, True, True, False, True),
    (9, 0, 24, 4, torch.bfloat16, True, True, False, True),
    (9, 16, 0, 4, torch.bfloat16, True, True, False, True),
    (210, 24, 40, 8, torch.bfloat16, True, True, False, False),
]


def layer(M, N, K, R, dtype, wide, drop, scales, bias):
    """Tensors of one layer by name; missing ones are None."""
    gen = torch.Generator().manual_seed(M + N + K)

    def normal(*shape, scale=1.0, dtype=dtype):
        return (torch.randn(*shape, generator=gen) * scale).to(dtype)

    adapter = torch.float32 if wide else dtype
    t = dict(
        x=normal(M, K), weight=normal(N, K, scale=max(K, 1) ** -0.5), A=normal(R, K, scale=max(K, 1) ** -0.5, dtype=adapter),
        B=normal(N, R, scale=max(R, 1) ** -0.5, dtype=adapter), dy=normal(M, N), seed=torch.tensor([41]) if drop else None,
        p=0.25 if drop else 0.0, bias=normal(N) if bias else None,
    )  # fmt: skip
    for name, size in dict(d=R, p_d=K, p_b=K, g_b=N, g_d=N).items():
        t[name] = normal(size) if scales else None
    return t


NEEDS = ("x", "A", "B", "bias", "d"), ("A", "B", "bias", "d"), ("B", "bias"), ("x", "B"), ("A",), ("x",), ("d",), ()


@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_gradients(device, case):
    t = layer(*case)
    M, _, _, R = case[:4]
    u = torch.randn(M, R, generator=torch.Generator().manual_seed(R))
    for needs in NEEDS:
        check_gradients(backward(
            t["dy"], t["x"] if "A" in needs else None, u, None, t["weight"], t["A"], t["B"], needs=needs, scaling=-1.5,
            dropout_p=t["p"], seed=t["seed"], d=t["d"], p_b=t["p_b"], p_d=t["p_d"], g_d=t["g_d"],
        ))  # fmt: skip


@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_forward(device, case):
    t = layer(*case)
    c = forward(
        t["x"], t["weight"], t["A"], t["B"], bias=t["bias"], scaling=-1.5, dropout_p=t["p"], seed=t["seed"], d=t["d"],
        p_d=t["p_d"], g_b=t["g_b"], g_d=t["g_d"],
    )  # fmt: skip
    y, u, h = OPS["lora_linear_fwd"](c)
    expected = lora_linear_fwd_ref(double(c))
    close(y, expected[0], t["x"].dtype)
    close(u, expected[1], torch.float32)
    assert h.numel() == 0


@pytest.mark.parametrize("layout", ["transposed", "padded", "misaligned"])
def test_any_layout(device, layout):
    def lay_out(a: torch.Tensor) -> torch.Tensor:
        if layout == "transposed":
            return a.t().contiguous().t()
        wide = torch.full((a.shape[0], a.shape[1] + (8 if layout == "padded" else 3)), float("nan"), dtype=a.dtype)
        first = 0 if layout == "padded" else 1
        wide[:, first : first + a.shape[1]] = a
        return wide[:, first : first + a.shape[1]]

    t = layer(37, 40, 48, 8, torch.bfloat16, True, True, False, False)
    x, weight, A, B, dy = (lay_out(t[name]) for name in ("x", "weight", "A", "B", "dy"))
    numbers = dict(scaling=2.0, dropout_p=t["p"], seed=t["seed"])
    c = forward(x, weight, A, B, **numbers)
    y, u, _ = OPS["lora_linear_fwd"](c)
    expected = lora_linear_fwd_ref(double(c))
    close(y, expected[0], y.dtype)
    close(u, expected[1], u.dtype)
    check_gradients(backward(dy, x, u, None, weight, A, B, needs=("x", "A", "B", "bias"), **numbers))


def passes():
    """A call of every op by name."""
    t = layer(33, 24, 40, 8, torch.bfloat16, True, True, True, True)
    numbers = dict(scaling=2.0, dropout_p=t["p"], seed=t["seed"], d=t["d"], p_d=t["p_d"], g_d=t["g_d"])
    u = torch.randn(33, 8, generator=torch.Generator().manual_seed(8))
    both = [a | b for a, b in zip(OF_BRANCH, OF_BASE)]
    x, rest, own = batch(torch.bfloat16, ["1", None, "0", "1", "0"], vectors=OF_BRANCH)
    whole = batch(torch.bfloat16, ["1", None, "0", "1", "0"], vectors=both)
    weight, bias = torch.ones(40, 24).to(x.dtype), torch.ones(40).to(x.dtype)
    needs = ("x", "A", "B", "bias", "d")
    drop = t["g_d"], "silu", 2.0, t["p"], False, t["seed"]
    return {
        "lora_linear_fwd": forward(t["x"], t["weight"], t["A"], t["B"], bias=t["bias"], **numbers),
        "lora_linear_bwd": backward(t["dy"], t["x"], u, None, t["weight"], t["A"], t["B"], needs=needs, **numbers),
        "multi_lora_linear_fwd": MultiForward(
            whole[0], *base(weight), 40, bias, *whole[1], None, None, *whole[2], save_base=True
        ),
        "sgmv_add": Add(torch.ones(5, 40).to(x.dtype), x, *rest, *own),
        "lora_row_norm": RowNorm([t["weight"]], "dense", t["A"], t["B"], -1.5),
        "bottleneck_adapter_fwd": Bottleneck(t["x"], t["dy"], t["A"], t["B"], t["d"], t["bias"], None, *drop),
        "bottleneck_adapter_bwd": BottleneckGrad(
            t["dy"], t["x"], u, t["A"], t["B"], t["bias"], None, *drop, False, [True] * 5 + [False, True]
        ),
    }


# What starts a pass. Vectors p_b, of which one adapter has one, go in front of the vendor's product.
NATIVE = {
    "lora_linear_fwd": ["cuda_lora_linear_forward"],
    "lora_linear_bwd": ["cuda_lora_linear_backward"],
    "multi_lora_linear_fwd": ["cuda_scale_rows", "cuda_sgmv_add"],
    "sgmv_add": ["cuda_sgmv_add"],
    "lora_row_norm": ["cuda_lora_row_norm"],
    "bottleneck_adapter_fwd": ["cuda_bottleneck_forward"],
    "bottleneck_adapter_bwd": ["cuda_bottleneck_backward"],
}


@pytest.mark.parametrize("op", NATIVE)
def test_a_pass_is_one_native_call(device, simulated, op):
    """The first one too, which finds nothing kept."""
    if op == "multi_lora_linear_fwd" and device < 90:
        pytest.skip("declined below sm_90")
    c = passes()[op]
    for _ in range(2):
        simulated.calls.clear()
        OPS[op](c)
        assert simulated.calls == NATIVE[op]


def flat(results):
    """Tensors of a result, or those that an op writes."""
    return [t for r in results for t in (r if isinstance(r, list) else [r])]


class Subclass(torch.Tensor):
    """No plain tensor."""


def strange(value, make):
    """Arguments with ``make`` of every tensor."""
    if isinstance(value, (list, tuple)):
        parts = [strange(v, make) for v in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return make(value) if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize("make", [lambda t: t.as_subclass(Subclass), lambda t: torch._neg_view(-t)], ids=["sub", "neg"])
def test_what_is_no_plain_tensor(device, make):
    """Computed all the same, written to as well; the negative of memory is not its memory."""
    for op, c in passes().items():
        if op == "multi_lora_linear_fwd" and device < 90:
            continue
        other = strange(c, lambda t: make(t.clone()) if t.dtype != torch.int32 else t.as_subclass(Subclass))
        got, expected = OPS[op](other), OPS[op](c)
        if op == "sgmv_add":
            got, expected = [other.out], [c.out]
        for a, b in zip(flat(got), flat(expected), strict=True):
            assert torch.equal(a.resolve_neg().as_subclass(torch.Tensor), b), op


def test_memory_by_the_functions_that_torchs_libraries_export(device, sim):
    """The bits that memory by torch.empty gives."""
    cases = [c for c in passes().items() if c[0].startswith("lora_linear")]
    expected = [flat(OPS[op](c)) for op, c in cases]
    assert marshal.set_up(sim.module, None) is None
    for (op, c), right in zip(cases, expected, strict=True):
        assert all(map(torch.equal, flat(OPS[op](c)), right))


def test_what_outlives_a_call(device, monkeypatch):
    """Addresses by contents, counters by stream; a graph has its own and leaves none, whatever is kept."""
    c, whole = passes()["sgmv_add"], forward(*(torch.randn(16, 16).bfloat16() for _ in range(4)))
    expected = OPS["lora_linear_fwd"](whole)
    for _ in range(2):
        OPS["sgmv_add"](c)
    kept = [*cuda_native.kept_addresses.values(), *cuda_native.kept_counters.values()]
    assert kept[0].view(torch.int64).tolist() == [t.data_ptr() for t in (*c.weights, *c.vectors)]
    assert len(cuda_native.kept_addresses) == 1 and len(cuda_native.kept_counters) == 1
    monkeypatch.setattr(cuda_native, "stream", lambda t: 7)
    OPS["sgmv_add"](c)
    assert len(cuda_native.kept_addresses) == 2
    monkeypatch.setattr(cuda_native, "stream", lambda t: 0)
    monkeypatch.setattr(cuda_native, "capturing", lambda: True)
    before = [*cuda_native.kept_addresses.values(), *cuda_native.kept_counters.values()]
    other = c._replace(out=c.out.clone())
    OPS["sgmv_add"](c)
    for each in kept:
        each.fill_(1)  # of no use to anyone
    OPS["sgmv_add"](other)
    assert torch.equal(other.out, c.out) and all(map(torch.equal, OPS["lora_linear_fwd"](whole), expected))
    after = [*cuda_native.kept_addresses.values(), *cuda_native.kept_counters.values()]
    assert [*map(id, after)] == [*map(id, before)]
    for each in kept:
        each.zero_()


MISFITS = {
    "lora_linear_fwd": dict(
        x=lambda t: t.float(), base=lambda b: [b[0][:, 1:]], lora_A=lambda t: t[1:], lora_B=lambda t: t.bfloat16(),
        bias=lambda t: t[1:], seed=lambda t: t.int(), dropout_p=lambda p: 1.0, scales=lambda s: s[:-1],
    ),
    "lora_linear_bwd": dict(
        x=lambda t: t[1:], u=lambda t: t[:, 1:], base=lambda b: [b[0].half()], dy=lambda t: t[:, 1:],
        seed=lambda t: None, scales=lambda s: [s[0][:-1], *s[1:]],
    ),
    "sgmv_add": dict(
        out=lambda t: t[1:], table=lambda t: t[:, 1:], weights=lambda w: [w[0].half(), *w[1:]],
        scaling=lambda t: t[1:], order=lambda t: t.long(), starts=lambda t: t[1:], max_rank=lambda r: -1,
        vectors=lambda v: [t.double() for t in v],
    ),
    "multi_lora_linear_fwd": dict(
        bias=lambda t: t[1:], table=lambda t: t[:, 1:], starts=lambda t: t[1:], vectors=lambda v: [t.half() for t in v],
    ),
    "bottleneck_adapter_fwd": dict(
        h=lambda t: t[:, 1:], residual=lambda t: t[1:], down=lambda t: t.half(), up=lambda t: t[:, 1:],
        down_bias=lambda t: t[1:], up_bias=lambda t: t.half(), gate=lambda t: torch.ones(2), out_scale=lambda t: t[1:],
        seed=lambda t: t.int(), dropout_p=lambda p: 1.0,
    ),
    "bottleneck_adapter_bwd": dict(
        dy=lambda t: t[:, 1:], h=lambda t: t[1:], t=lambda t: t[:, 1:], down=lambda t: t[1:], up=lambda t: t.half(),
        gate=lambda t: torch.ones(2), through=lambda t: True,
    ),
    "lora_row_norm": dict(lora_A=lambda t: t[:, 1:], lora_B=lambda t: t[1:], scaling=lambda s: "two"),
}  # fmt: skip


@pytest.mark.parametrize("op, name", [(op, name) for op, changes in MISFITS.items() for name in changes])
def test_nothing_runs_on_what_does_not_fit(device, op, name):
    """Whatever was checked before: no kernel reads or writes beside a tensor."""
    if op == "multi_lora_linear_fwd" and device < 90:
        pytest.skip("declined below sm_90")
    c = passes()[op]
    with pytest.raises(RuntimeError, match="takes no call like this one"):
        OPS[op](c._replace(**{name: MISFITS[op][name](getattr(c, name))}))


@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_row_norm(device, case):
    t = layer(*case)
    c = RowNorm([t["weight"]], "dense", t["A"], t["B"], -1.5)
    close(OPS["lora_row_norm"](c), lora_row_norm_ref(double(c)), torch.float32)
