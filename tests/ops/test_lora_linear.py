"""lora_linear as an op: accuracy on every back end that runs on CPU tensors, schema, shapes, choice, determinism."""

import pytest
import torch

from peftkern import lora_linear
from peftkern.dispatch.choose import choose, load
from peftkern.dispatch.registry import OPS
from peftkern.equation import Needs
from peftkern.settings import current
from peftkern.testing.accuracy import check
from peftkern.testing.arguments import backward, forward
from peftkern.testing.problems import random_problem

ops = torch.ops.peftkern
CPU_REASON = load("cpu").unavailable(current())
BACKENDS = [
    pytest.param(("reference", "auto"), id="reference"),
    *(
        pytest.param(
            ("cpu", base),
            id=f"cpu-{base}",
            marks=pytest.mark.skipif(CPU_REASON is not None, reason=f"no native build: {CPU_REASON}"),
        )
        for base in ("auto", "vendor", "panels")
    ),
]
HALF = (torch.bfloat16, torch.float16)


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    name, base = request.param
    monkeypatch.setenv("PEFTKERN_BACKEND", name)
    monkeypatch.setenv("PEFTKERN_CPU_BASE", base)
    return request.param


def assert_accurate(problem):
    bad = [row for row in check(problem) if not row.ok]
    assert not bad, f"{problem}\n" + "\n".join(f"{row.ratio:.2f} {row}" for row in bad)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_accuracy_of_random_problems(backend, dtype):
    # The vendor's half-precision product is seconds per call on some CPUs: forced there, it gets small problems.
    small = backend[1] == "vendor" and dtype in HALF
    limits = dict(max_M=64, max_KN=200) if small else dict(max_M=700, max_KN=1200)
    for seed in range(15):
        assert_accurate(random_problem(1000 + seed, dtype, **limits))


CASES = [(torch.float32, 51), (torch.float32, 84), (torch.float32, 150), (torch.float16, 131)]


@pytest.mark.parametrize("dtype, seed", CASES, ids=str)
def test_accuracy_of_problems_that_once_failed(backend, dtype, seed):
    # Narrow products, and one output of rank 290.
    assert_accurate(random_problem(seed, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_accuracy_of_a_large_problem(backend, dtype):
    if backend[1] == "vendor" and dtype in HALF:
        pytest.skip("the vendor's half-precision product takes minutes at this size on CPUs without support for it")
    problem = random_problem(77, dtype, large=True, max_M=1200, max_KN=2100)
    assert problem.M * problem.K * problem.N > 2**31
    assert_accurate(problem)


def tensors(dtype=torch.float32, M=6, K=20, N=9, R=3, seed=0):
    g = torch.Generator().manual_seed(seed)

    def normal(*s):
        return torch.randn(*s, generator=g).to(dtype)

    return [normal(M, K), normal(N, K), normal(R, K), normal(N, R)]


@pytest.mark.parametrize("empty", ["M", "R", "K", "N"])
def test_empty_sizes(backend, empty):
    sizes = dict(M=4, K=8, N=5, R=3) | {empty: 0}
    x, w, a, b = tensors(**sizes)
    bias = torch.randn(sizes["N"])
    args = [t.requires_grad_() for t in (x, a, b)]
    y = lora_linear(x, w, a, b, bias=bias, scaling=2.0, dropout_p=0.5, training=True, seed=1)
    assert y.shape == (sizes["M"], sizes["N"])
    y.sum().backward()
    assert all(t.grad.shape == t.shape and torch.isfinite(t.grad).all() for t in args)
    if empty in "RK":
        torch.testing.assert_close(y.detach(), x.detach() @ w.t() + bias)


def test_dropped_elements_contribute_exactly_zero(backend):
    x, w, a, b = tensors(K=64)
    keep = torch.ops.peftkern.dropout_mask(torch.tensor([9]), 6, 64, 0.5)
    poisoned = x.masked_fill(~keep, float("nan"))
    drop = dict(dropout_p=0.5, seed=torch.tensor([9]))
    y, u, _ = ops.lora_linear_fwd(*forward(poisoned, torch.zeros_like(w), a, b, **drop))
    assert torch.isfinite(u).all()
    assert torch.equal(u, ops.lora_linear_fwd(*forward(x, w, a, b, **drop))[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_inputs_same_bits_and_thread_counts(backend, dtype):
    if backend[1] == "vendor" and dtype == torch.bfloat16:
        pytest.skip("the branch is the same under every base product, the vendor's bf16 product is slow on some CPUs")
    x, w, a, b = tensors(dtype, M=130, K=515, N=260, R=7)
    dy = torch.randn(130, 260).to(dtype)
    options = dict(scaling=1.5, dropout_p=0.3, seed=torch.tensor([4]))

    def run():
        _, u, _ = ops.lora_linear_fwd(*forward(x, w, a, b, **options))
        *grads, vectors = ops.lora_linear_bwd(
            *backward(dy, x, u, None, w, a, b, needs=("x", "A", "B", "bias"), **options)
        )
        return [u, *grads, *vectors]

    threads = torch.get_num_threads()
    first = run()
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            if backend[0] == "cpu" or n == threads:
                assert all(torch.equal(p, q) for p, q in zip(first, run(), strict=True))
    finally:
        torch.set_num_threads(threads)


def test_branch_bits_of_a_row_do_not_depend_on_the_batch(backend):
    if backend[0] == "reference":
        pytest.skip("the reference is the vendor's product, which chooses by M")
    x, w, a, b = tensors(M=300, K=700, N=40, R=9)

    def u(rows):
        return ops.lora_linear_fwd(*forward(rows, w, a, b))[1]

    whole = u(x)
    for start, stop in [(0, 1), (5, 6), (17, 80), (100, 300)]:
        assert torch.equal(u(x[start:stop].clone()), whole[start:stop])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(dtype, backend):
    if backend[0] == "cpu" and dtype == torch.float64:
        pytest.skip("fp64 belongs to the reference")
    x, w, a, b = tensors(dtype)
    M, K, N, R = 6, 20, 9, 3
    v = {n: torch.randn(n, dtype=dtype) for n in (K, N, R)}
    vectors = dict(d=v[R], p_b=v[K], p_d=v[K], g_b=v[N], g_d=v[N], bias=v[N], dropout_p=0.4, seed=torch.tensor([2]))
    dy, u = torch.randn(M, N, dtype=dtype), torch.randn(M, R, dtype=dtype)
    for options in ({}, vectors):
        full = bool(options)
        torch.library.opcheck(ops.lora_linear_fwd, forward(x, w, a, b, scaling=1.5, save_base=full, **options))
        options.pop("bias", None)
        h, needs = (dy.clone(), Needs._fields) if full else (None, ("x", "A", "B"))
        torch.library.opcheck(ops.lora_linear_bwd, backward(dy, x, u, h, w, a, b, needs=needs, scaling=1.5, **options))


def negative(t):
    """The values of ``t`` in memory that holds their negatives."""
    view = torch.complex(torch.zeros_like(t), -t).conj().imag
    assert view.is_neg() and torch.equal(view, t)
    return view


def test_views_that_negate(backend):
    x, w, a, b = tensors()
    g = torch.Generator().manual_seed(1)
    dy, u, h, bias = (torch.randn(*s, generator=g) for s in ((6, 9), (6, 3), (6, 9), (9,)))
    d, p_b, p_d, g_b, g_d = (torch.randn(n, generator=g) for n in (3, 20, 20, 9, 9))
    scales = dict(d=d, p_b=p_b, p_d=p_d, g_b=g_b, g_d=g_d)
    t = dict(x=x, weight=w, lora_A=a, lora_B=b, bias=bias, **scales)
    expected = ops.lora_linear_fwd(*forward(**t))
    for name in t:
        torch.testing.assert_close(ops.lora_linear_fwd(*forward(**t | {name: negative(t[name])})), expected)
    t = dict(dy=dy, x=x, u=u, h=h, weight=w, lora_A=a, lora_B=b, **scales)
    expected = ops.lora_linear_bwd(*backward(**t, needs=Needs._fields))
    for name in t:
        found = ops.lora_linear_bwd(*backward(**t | {name: negative(t[name])}, needs=Needs._fields))
        torch.testing.assert_close(found, expected)


def test_outputs_do_not_alias_inputs_or_each_other(backend):
    x, w, a, b = tensors()
    outs = list(ops.lora_linear_fwd(*forward(x, w, a, b, save_base=True)))
    dy = torch.randn(6, 9)
    *grads, vectors = ops.lora_linear_bwd(*backward(dy, x, outs[1], outs[2], w, a, b, needs=Needs._fields))
    outs += [*grads, *vectors]
    assert all(t.numel() for t in outs)
    ins = [x, w, a, b, dy]
    pointers = [t.untyped_storage().data_ptr() for t in (*outs, *ins)]
    assert len(set(pointers)) == len(pointers)


def test_choice_falls_through_and_names_reasons(monkeypatch):
    x, w, a, b = tensors(torch.float64)
    problem = OPS["lora_linear_fwd"].describe(forward(x, w, a, b))
    choice = choose(problem, current())
    assert choice.backend == "reference" and "cpu" in choice.declined and "float64" in str(problem)
    monkeypatch.setenv("PEFTKERN_BACKEND", "cpu")
    with pytest.raises(RuntimeError, match="PEFTKERN_BACKEND=cpu cannot take"):
        lora_linear(x, w, a, b)
    monkeypatch.setenv("PEFTKERN_BACKEND", "fast")
    with pytest.raises(ValueError, match="PEFTKERN_BACKEND"):
        lora_linear(x, w, a, b)


def test_fake_and_meta_agree_with_real():
    t = [*tensors(), torch.randn(6, 9), torch.randn(6, 3)]

    def run(x, w, a, b, dy, u):
        outs = ops.lora_linear_fwd(*forward(x, w, a, b, save_base=True))
        for needs in (("x", "A", "B"), Needs._fields):
            *grads, vectors = ops.lora_linear_bwd(*backward(dy, x, u, dy, w, a, b, needs=needs))
            outs += (*grads, *vectors)
        return [(t.shape, t.dtype, t.stride()) for t in outs]

    assert run(*t) == run(*(v.to("meta") for v in t))
