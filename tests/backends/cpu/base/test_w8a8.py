"""Products of integers: bits of the definition on every level, what rounding costs, gradients, what is refused."""

from __future__ import annotations

import pytest
import torch
from kernel_calls import backward, forward
from torch import Tensor

from peftkern import lora_linear, multi_lora_linear, quantize, settings
from peftkern.autograd.lora_linear import lora_linear_with
from peftkern.autograd.row_norm import row_norm
from peftkern.backends.cpu import call
from peftkern.bases.base import Base, kind_of, operands

pytestmark = pytest.mark.skipif(call.unavailable is not None, reason=f"no native calls: {call.unavailable}")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((1, 1, 1), (5, 37, 61), (3, 33, 513), (17, 64, 130), (40, 129, 1030), (29, 700, 70))


def weight(N: int, K: int, dtype: torch.dtype = torch.float32) -> Base:
    """Every code there is, -128 as well."""
    codes = torch.randint(-128, 128, (N, K), dtype=torch.int8)
    return Base("w8a8", (codes, ((0.2 + torch.rand(N)) / 100).to(dtype)), (N, K))


def rounded(t: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of t's rows, in fp32."""
    most = t.abs().amax(dim=1, keepdim=True)
    return (t * (most.reciprocal() * 127.0)).round().long(), most / 127.0


def product(t: Tensor, base: Base) -> Tensor:
    """Base(t), its sums in whole numbers."""
    (q, step), (codes, scale) = rounded(t.float()), base.tensors
    return ((q @ codes.long().t()).float() * scale.float() * step).to(t.dtype)


def gradient(t: Tensor, base: Base) -> Tensor:
    codes, scale = base.tensors
    q, step = rounded(t.float() * scale.float())
    return ((q @ codes.long()).float() * step).to(t.dtype)


@pytest.mark.parametrize("M, N, K", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_of_the_definition(level, dtype, M, N, K):
    torch.manual_seed(M * N + K)
    base = weight(N, K, dtype)
    x, dy = torch.randn(M, K).to(dtype), torch.randn(M, N).to(dtype)
    assert torch.equal(forward(x, base, N, "int8"), product(x, base))
    assert torch.equal(backward(dy, base, K, "int8"), gradient(dy, base))


def test_large_rows_do_not_overflow_on_the_way(level):
    """Their sums of codes, by the row's step alone, would."""
    base, x = weight(9, 130), 1e36 * torch.randn(3, 130)
    y = forward(x, base, 9, "int8")
    assert y.isfinite().all() and torch.equal(y, product(x, base))
    W = kind_of("int8").dequantise(base.tensors, torch.float64, (9, 130))
    assert (y - x.double() @ W.t()).norm() < 0.02 * y.double().norm()


def test_columns_and_rows_that_are_not_adjacent(level):
    base = weight(24, 50)
    x, whole = torch.randn(50, 7).t(), torch.randint(-128, 128, (30, 90), dtype=torch.int8)
    assert torch.equal(forward(x, base, 24, "int8"), product(x, base))
    part = Base("w8a8", (whole[3:27, 11:61], base.tensors[1]))
    assert torch.equal(forward(x, part, 24, "int8"), product(x, part))


def test_rows_of_zeros_and_of_tiny_numbers(level):
    base = weight(20, 70)
    x = torch.randn(5, 70)
    x[1] = 0
    x[3] *= 1e-36
    y = forward(x, base, 20, "int8")
    assert torch.equal(y[1], torch.zeros(20)) and not y[3].any()
    assert torch.equal(y[::2], product(x[::2], base))


@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
def test_a_row_that_is_not_finite_is_nan_and_no_other(level, bad):
    base = weight(20, 600)
    x = torch.randn(6, 600)
    x[2, 590] = bad
    y = forward(x, base, 20, "int8")
    assert y[2].isnan().all()
    assert torch.equal(y[[0, 1, 3, 4, 5]], product(x[[0, 1, 3, 4, 5]], base))
    t, W = operands("w8a8", base.tensors, x, (20, 600), False)
    assert (t @ W.t())[2].isnan().all()


def test_the_largest_sums(level):
    K = 1 << 17
    base = Base("w8a8", (torch.full((2, K), -128, dtype=torch.int8), torch.ones(2)))
    x = torch.stack([torch.full((K,), 3.0), -torch.full((K,), 3.0)])
    assert torch.equal(forward(x, base, 2, "int8"), product(x, base))
    longer = Base("w8a8", (torch.zeros(2, K + 1, dtype=torch.int8), torch.ones(2)))
    with pytest.raises(ValueError, match="131072"):
        lora_linear(torch.zeros(1, K + 1), longer, torch.zeros(1, K + 1), torch.zeros(2, 1))


@pytest.mark.parametrize("threads", [1, 3])
def test_a_rows_bits_do_not_depend_on_the_batch(level, threads):
    base = weight(75, 2300)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for way, a, size in ((forward, torch.randn(40, 2300), 75), (backward, torch.randn(40, 75), 2300)):
            whole = way(a, base, size, "int8")
            for rows in (1, 3, 17):
                assert torch.equal(way(a[:rows], base, size, "int8"), whole[:rows])
    finally:
        torch.set_num_threads(before)


def test_more_rows_than_are_rounded_at_once():
    # 16 MB of codes: 128 rows of the longest.
    K = 1 << 17
    base, x = weight(3, K), torch.randn(300, K)
    assert torch.equal(forward(x, base, 3, "int8"), product(x, base))


def test_what_rounding_costs():
    """The bound of peftkern/bases/int8.py for each element, and the relative RMS error for normal x and dy."""
    torch.manual_seed(0)
    N, K = 300, 4096
    base = quantize(torch.randn(N, K), "int8", compute="int8")
    W = kind_of("int8").dequantise(base.tensors, torch.float64, (N, K))
    for way, t, size, matrix in (
        (forward, torch.randn(64, K), N, W.t()),
        (backward, torch.randn(64, N), K, W),
    ):
        exact = t.double() @ matrix
        error = way(t, base, size, "int8").double() - exact
        assert 0.003 < error.norm() / exact.norm() < 0.011
        scale = base.tensors[1].double()[:, None]
        unscaled = t.double() if way is forward else t.double() * scale.t()
        step = unscaled.abs().amax(dim=1, keepdim=True) / 127
        most = step / 2 * (matrix if way is forward else matrix / scale).abs().sum(0)
        assert (error.abs() <= most + 1e-5 * exact.abs().max()).all()


def exact(x, base, A, B, bias, s, dy):
    """(y, dx, dA, dB) in fp64, of codes that are rounded in fp32 as the kernels' are."""
    N, K = base.shape
    t, W = operands("w8a8", base.tensors, x.float(), (N, K), False)
    g, codes = operands("w8a8", base.tensors, dy.float(), (N, K), True)
    x, dy, A, B = x.double(), dy.double(), A.double(), B.double()
    y = t.double() @ W.double().t() + s * (x @ A.t()) @ B.t() + bias.double()
    dx = g.double() @ codes.double() + s * (dy @ B) @ A
    return y, dx, s * (dy @ B).t() @ x, s * dy.t() @ (x @ A.t())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lora_linear(level, monkeypatch, dtype):
    monkeypatch.setenv("PEFTKERN_BACKEND", "cpu")
    torch.manual_seed(1)
    M, N, K, R = 33, 50, 90, 5
    base = quantize(torch.randn(N, K), "int8", compute="int8")
    x, dy, bias = torch.randn(M, K).to(dtype).requires_grad_(), torch.randn(M, N).to(dtype), torch.randn(N)
    A, B = torch.randn(R, K, requires_grad=True), torch.randn(N, R, requires_grad=True)
    y = lora_linear(x, base, A, B, scaling=0.7, bias=bias)
    got = y, *torch.autograd.grad(y, (x, A, B), dy)
    with torch.no_grad():
        expected = exact(x, base, A, B, bias, 0.7, dy)
    unit = torch.finfo(dtype).eps
    for ours, oracle in zip(got, expected, strict=True):
        # The branch's gradients are sums in fp32; y and dx are rounded once.
        rounding = unit / 2 if ours.dtype == dtype else 0.0
        torch.testing.assert_close(ours.double(), oracle, rtol=rounding * 1.01, atol=2e-6 * oracle.abs().max().item())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_reference_says_the_same(monkeypatch, dtype):
    torch.manual_seed(2)
    M, N, K, R = 9, 31, 75, 3
    base = weight(N, K)
    args = [torch.randn(M, K).to(dtype), torch.randn(R, K), torch.randn(N, R)]
    vectors = dict(base_in_scale=torch.rand(K) + 0.5, base_out_scale=torch.rand(N) + 0.5)
    dy, found = torch.randn(M, N).to(dtype), {}
    for backend in ("cpu", "reference"):
        monkeypatch.setenv("PEFTKERN_BACKEND", backend)
        x, A, B = (t.clone().requires_grad_() for t in args)
        y = lora_linear_with(x, base, A, B, None, coefficients=vectors)
        found[backend] = y, *torch.autograd.grad(y, (x, A, B), dy)
    for ours, reference in zip(*found.values(), strict=True):
        torch.testing.assert_close(
            ours, reference, rtol=2 * torch.finfo(dtype).eps, atol=1e-5 * reference.abs().max().item()
        )


def test_many_adapters(monkeypatch):
    monkeypatch.setenv("PEFTKERN_BACKEND", "cpu")
    base = weight(40, 66)
    adapters = [(torch.randn(r, 66) / 8, torch.randn(40, r), 0.5) for r in (2, 7)]
    ids = torch.tensor([1, -1, 0, 0, 1])
    x = torch.randn(5, 66, requires_grad=True)
    y = multi_lora_linear(x, base, adapters, ids)
    dy = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, dy)
    for i, which in enumerate(ids.tolist()):
        row = x.detach()[i : i + 1].requires_grad_()
        A, B, s = adapters[which] if which >= 0 else (torch.zeros(1, 66), torch.zeros(40, 1), 1.0)
        alone = lora_linear(row, base, A, B, scaling=s)
        (grad,) = torch.autograd.grad(alone, row, dy[i : i + 1])
        torch.testing.assert_close(y[i : i + 1], alone)
        torch.testing.assert_close(dx[i : i + 1], grad)


def test_the_rows_norm_is_that_of_the_weight(monkeypatch):
    monkeypatch.setenv("PEFTKERN_BACKEND", "cpu")
    base, A, B = weight(30, 70), torch.randn(4, 70), torch.randn(30, 4)
    assert torch.equal(row_norm(base, A, B, 0.3), row_norm(base._replace(kind="int8"), A, B, 0.3))


def test_compiled_and_under_autocast():
    base, A, B = weight(40, 64), torch.randn(4, 64, requires_grad=True), torch.randn(40, 4, requires_grad=True)
    x = torch.randn(6, 64, requires_grad=True)

    def step(x):
        with torch.autocast("cpu", torch.bfloat16):
            y = lora_linear(x, base, A, B)
        return y, *torch.autograd.grad(y.float().square().sum(), (x, A, B))

    plain = step(x)
    assert plain[0].dtype == torch.bfloat16
    torch.testing.assert_close(plain[0], lora_linear(x.bfloat16(), base, A, B), rtol=0, atol=0)
    compiled = torch.compile(lambda x: lora_linear(x, base, A, B), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), lora_linear(x, base, A, B), rtol=0, atol=0)


def test_no_other_product_reads_it():
    base, other = weight(24, 33), weight(24, 33)._replace(kind="int8")
    x, A, B = torch.randn(2, 33), torch.zeros(1, 33), torch.zeros(24, 1)

    def learn(base, way):
        return call.learn_forward(
            object(), 1, x, base.kind, base.tensors, A, B, None, 1.0, 0.0, None, None, True, False, way
        )

    assert learn(base, "int8") and learn(other, "panels")
    for each, way in ((base, "panels"), (base, "few"), (base, "bf16"), (base, "vendor"), (other, "int8")):
        with pytest.raises(ValueError, match=r"product|vendor"):
            learn(each, way)
    with settings.using(cpu_kind="few"):
        assert torch.equal(lora_linear(x, base, A, B), forward(x, base, 24, "int8"))


def test_one_choice_is_not_taken_for_the_others():
    """The same tensors as int8 and as w8a8, in the same process, one after the other."""
    base = weight(24, 33)
    x, A, B = torch.randn(5, 33), torch.zeros(1, 33), torch.zeros(24, 1)
    W = kind_of("int8").dequantise(base.tensors, torch.float32, (24, 33))
    for _ in range(2):
        assert torch.equal(lora_linear(x, base, A, B), product(x, base))
        torch.testing.assert_close(lora_linear(x, base._replace(kind="int8"), A, B), x @ W.t(), rtol=1e-5, atol=1e-5)
