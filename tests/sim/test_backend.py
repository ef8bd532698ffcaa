"""The CUDA back end from the ops' arguments to the kernels, run by the simulator on CPU tensors."""

from __future__ import annotations

import contextlib

import pytest
import torch

from peftkern import AdapterBank
from peftkern.backends.cuda import OPS
from peftkern.backends.cuda import lora_linear as cuda_lora
from peftkern.backends.cuda import multi_lora_linear as cuda_multi
from peftkern.backends.cuda import native as cuda_native
from peftkern.ops.dropout_mask import Mask, dropout_mask_ref
from peftkern.ops.lora_linear import lora_linear_bwd_ref, lora_linear_fwd_ref
from peftkern.ops.lora_row_norm import RowNorm, lora_row_norm_ref
from peftkern.ops.multi_lora_linear import MultiForward, Route, multi_lora_linear_fwd_ref, multi_lora_linear_route_ref
from peftkern.ops.sgmv import Add, sgmv_add_ref
from peftkern.problem import Problem
from peftkern.settings import current
from peftkern.testing.arguments import backward, base, forward
from peftkern.verify.static import cuda_launches


@pytest.fixture(params=(80, 90), ids=("sm_80", "sm_90"))
def device(request, sim, monkeypatch):
    """The back end on a simulated device with few multiprocessors; its architecture."""
    sim.configure()
    monkeypatch.setattr(cuda_native, "_C", sim.module)
    monkeypatch.setattr(cuda_native, "device", lambda t: cuda_native.Device(request.param, 3))
    monkeypatch.setattr(cuda_native, "on_device", lambda t: contextlib.nullcontext())
    monkeypatch.setattr(cuda_native, "stream", lambda t: 0)
    monkeypatch.setattr(cuda_native, "capturing", lambda: False)
    monkeypatch.setattr(cuda_native, "kept_counters", {})
    monkeypatch.setattr(cuda_native, "kept_addresses", {})
    yield request.param
    assert not any(c.any() for c in cuda_native.kept_counters.values()), "counters are not ready for the next launch"


def test_dropout_mask(device):
    seed = torch.tensor([-5])
    assert torch.equal(OPS["dropout_mask"](Mask(seed, 5, 43, 0.3)), dropout_mask_ref(seed, 5, 43, 0.3))


def test_addresses_are_written_once(device):
    tensors = [torch.zeros(i) for i in range(300)]
    stored = cuda_native.addresses(tensors, tensors[0])
    assert stored.tolist() == [t.data_ptr() for t in tensors]
    assert cuda_native.addresses(tensors, tensors[0]) is stored


@pytest.mark.parametrize("M, C, R", [(5, 40, 3), (70, 130, 16), (1, 1100, 33)])
def test_shrink(device, M, C, R):
    gen = torch.Generator().manual_seed(C)
    x, b = torch.randn(M, C, generator=gen).to(torch.bfloat16), torch.randn(C, R, generator=gen)
    scale, seed = torch.rand(C, generator=gen), torch.tensor([9])
    got = cuda_lora.shrink(x, b.t(), scale=scale, alpha=-0.5, drop=cuda_native.dropout(0.25, seed))
    kept = torch.where(dropout_mask_ref(seed, M, C, 0.25), x.double() / 0.75, 0.0)
    expected = -0.5 * (kept * scale.double()) @ b.double()
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


def batch(dtype, ids, ranks=(8, 3), max_rank=8):
    """(x, arguments of the branch) of rows that take the bank's adapters "0", "1", ..., None for none."""
    gen = torch.Generator().manual_seed(1)
    bank = AdapterBank(24, 40, max_adapters=len(ranks) + 1, max_rank=max_rank, dtype=dtype)
    for name, rank in enumerate(ranks):
        A, B = torch.randn(rank, 24, generator=gen), torch.randn(40, rank, generator=gen)
        bank.add(str(name), A, B, scaling=0.5 * name)
    state = bank.snapshot()
    order, starts = multi_lora_linear_route_ref(Route(bank.ids(ids), state.table, state.mask))
    x = torch.randn(len(ids), 24, generator=gen).to(dtype)
    return x, (list(state.weights), state.table, state.scaling, state.max_rank, order, starts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sgmv_add(device, dtype):
    x, rest = batch(dtype, ["1", None, "0", "1", "0"])
    out = torch.randn(5, 40, generator=torch.Generator().manual_seed(2)).to(dtype)
    expected = out.clone()
    sgmv_add_ref(Add(expected, x, *rest))
    OPS["sgmv_add"](Add(out, x, *rest))
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
    x, rest = batch(torch.bfloat16, ["1", None, "2", "1", "0", None], ranks=(24, 3, 40), max_rank=64)
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
    y, u = OPS["multi_lora_linear_fwd"](c)
    expected_y, expected_u = multi_lora_linear_fwd_ref(c)
    torch.testing.assert_close(y, expected_y, rtol=2e-2, atol=4e-2)
    torch.testing.assert_close(u, expected_u, rtol=1e-5, atol=1e-5)
    assert (u[1] == 0).all() and (u[0, 3:] == 0).all() and (u[4, :24] != 0).all()


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


@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_row_norm(device, case):
    t = layer(*case)
    c = RowNorm([t["weight"]], "dense", t["A"], t["B"], -1.5)
    close(OPS["lora_row_norm"](c), lora_row_norm_ref(double(c)), torch.float32)
