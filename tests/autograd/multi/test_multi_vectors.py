"""Batches that mix methods: vectors per adapter, against fp64, one adapter at a time."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from peftkern import Adapter, AdapterBank, dropout_mask, lora_linear, multi_lora_linear, sgmv
from peftkern.bases.base import IDENTITY
from peftkern.equation import COEFFICIENTS, PLACES
from peftkern.many.table import table_of
from peftkern.testing import equations

AXES = {c.name: next(p.axis for p in PLACES if p.symbol == c.symbol) for c in COEFFICIENTS} | {"bias": "N"}
SEED = 11
# What each adapter of a batch has beside its matrices: LoRA, DoRA, VeRA twice, AdaLoRA, (IA)^3 at the input and at the
# output, LoRA with a bias, all at once.
METHODS = {
    "lora": (), "dora": ("base_out_scale", "delta_out_scale"), "vera": ("rank_scale", "delta_out_scale"),
    "vera2": ("rank_scale", "delta_out_scale"), "adalora": ("rank_scale",), "ia3 in": ("base_in_scale",),
    "ia3 out": ("base_out_scale", "bias"), "lora bias": ("bias",), "all": tuple(AXES),
}  # fmt: skip
RANKS = {
    "lora": 3,
    "dora": 4,
    "vera": 17,
    "vera2": 17,
    "adalora": 5,
    "ia3 in": 0,
    "ia3 out": 0,
    "lora bias": 1,
    "all": 2,
}


class Mixed:
    """A layer, a batch of ``M`` rows, and an adapter of every method; ``train``: all leaves need gradients."""

    def __init__(self, M: int, K: int, N: int, dtype=torch.float32, methods=tuple(METHODS), train: bool = True):
        self.methods, sizes = methods, {"K": K, "N": N}
        self.x = torch.randn(M, K).to(dtype).requires_grad_(train)
        self.weight = (torch.randn(N, K) / math.sqrt(K)).to(dtype)
        self.bias = torch.randn(N).to(dtype).requires_grad_(train)
        self.dy = torch.randn(M, N).to(dtype)
        # The last adapter of a list has no rows, some rows have no adapter.
        self.ids = torch.randint(-1, max(len(methods) - 1, 1), (M,))
        shared = [torch.randn(17, K) / math.sqrt(K), torch.randn(N, 17) / math.sqrt(17)]
        self.leaves: list[dict[str, Tensor]] = []
        for method in methods:
            R = RANKS[method]
            t = (
                {"lora_A": torch.randn(R, K) / math.sqrt(K), "lora_B": torch.randn(N, R) / math.sqrt(max(R, 1))}
                if R
                else {}
            )
            if method.startswith("vera"):
                t = dict(zip(t, shared))
            for name in METHODS[method]:
                t[name] = 1.0 + 0.5 * torch.randn((sizes | {"R": R})[AXES[name]])
            frozen = method.startswith("vera")
            self.leaves.append(
                {k: v.requires_grad_(train and not (frozen and k.startswith("lora"))) for k, v in t.items()}
            )
        self.scalings = [0.5 + 0.25 * i for i in range(len(methods))]

    def adapters(self) -> list:
        """Plain tuples where they are enough."""
        found = []
        for t, s in zip(self.leaves, self.scalings):
            rest = {k: v for k, v in t.items() if not k.startswith("lora")}
            A, B = t.get("lora_A"), t.get("lora_B")
            found.append(Adapter(A, B, s, **rest) if rest or A is None else (A, B, s))
        return found

    def bank(self, dtype=None) -> tuple[AdapterBank, Tensor]:
        """The same in a bank, and the ids of the rows there."""
        K, N = self.x.shape[1], self.weight.shape[0]
        bank = AdapterBank(K, N, max_adapters=len(self.leaves), max_rank=17, dtype=dtype or self.x.dtype)
        for method, t, s in zip(self.methods, self.leaves, self.scalings):
            rest = {k: v for k, v in t.items() if not k.startswith("lora")}
            bank.add(method, t.get("lora_A"), t.get("lora_B"), s, **rest)
        return bank, bank.ids([None if i < 0 else self.methods[i] for i in self.ids.tolist()])

    def named(self) -> dict[str, Tensor]:
        """Every leaf that needs a gradient, by name."""
        found = {"x": self.x, "bias": self.bias}
        for method, t in zip(self.methods, self.leaves):
            found |= {f"{method} {k}": v for k, v in t.items()}
        return {k: v for k, v in found.items() if v.requires_grad}

    def exact(self, weight=True, p: float = 0.0, absolute: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
        """y and all gradients in fp64, each row by the equation of its own adapter; or of absolute values."""
        make = (lambda t: t.detach().double().abs()) if absolute else (lambda t: t.detach().double())
        x, bias = make(self.x).requires_grad_(), make(self.bias).requires_grad_()
        W, (M, K), N = make(self.weight), self.x.shape, self.weight.shape[0]
        leaves = [{k: make(v).requires_grad_() for k, v in t.items()} for t in self.leaves]
        keep = dropout_mask(M, K, p, SEED) if p else None
        y = x.new_zeros(M, N)
        for i in range(-1, len(leaves)):
            rows = (self.ids == i).nonzero()[:, 0]
            t = dict(leaves[i]) if i >= 0 else {}
            t.setdefault("lora_A", x.new_zeros(0, K)), t.setdefault("lora_B", x.new_zeros(N, 0))
            t.setdefault("bias", bias)
            t["x"] = x[rows]
            if weight:
                t["weight"] = W
            drop = p if i >= 0 else 0.0
            one = equations.oracle(t, self.scalings[i] if i >= 0 else 1.0, keep[rows] if drop else None, drop)
            y = y.index_put((rows,), one)
        grads = dict(zip(("x", "bias"), (x, bias)))
        for method, t in zip(self.methods, leaves):
            grads |= {f"{method} {k}": v for k, v in t.items()}
        found = torch.autograd.grad(y, list(grads.values()), make(self.dy), allow_unused=True)
        return y.detach(), {k: torch.zeros_like(grads[k]) if g is None else g for k, g in zip(grads, found)}


def close(got: Tensor, want: Tensor, size: Tensor, name: str, steps: float = 16.0) -> None:
    """Within ``steps`` roundings of fp32 of the sum of absolute values, and two of got's own dtype."""
    half = {torch.float32: 2.0**-24, torch.float64: 2.0**-53, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
    base = 2.0**-53 if got.dtype == torch.float64 else 2.0**-24
    bound = steps * base * size + 2 * half[got.dtype] * want.abs() + 1e-30
    error = (got.double() - want).abs()
    assert got.shape == want.shape and bool((error <= bound).all()), (
        f"{name}: {float((error / bound).max()):.3g} of its bound"
    )


def check(problem: Mixed, run, weight=True, p: float = 0.0, extra: float = 0.0) -> None:
    """y and every gradient of ``run``. ``extra``: roundings of the activation's dtype that its sums may carry."""
    y = run()
    want, grads = problem.exact(weight, p)
    size, sizes = problem.exact(weight, p, absolute=True)
    steps = 16.0 + extra * 2.0**24
    close(y, want, size, "y", steps)
    names = problem.named()
    got = torch.autograd.grad(y, list(names.values()), problem.dy)
    for (name, leaf), g in zip(names.items(), got):
        assert g.dtype == leaf.dtype
        close(g, grads[name], sizes[name], name, steps)


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [(37, 21, 30), (150, 300, 131), (1, 5, 7)], ids=str)
def test_every_method_in_one_batch(size, dtype, p):
    t = Mixed(*size, dtype=dtype)
    # A row is rounded once more before the base product where its input is scaled, and the product as h.
    extra = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}.get(dtype, 0.0)

    def run():
        return multi_lora_linear(
            t.x, t.weight, t.adapters(), t.ids, bias=t.bias, dropout_p=p, training=True, seed=SEED
        )  # fmt: skip

    check(t, run, p=p, extra=extra)


@pytest.mark.parametrize("method", METHODS)
def test_one_method_alone(method):
    t = Mixed(19, 33, 29, methods=(method, "lora"))
    check(t, lambda: multi_lora_linear(t.x, t.weight, t.adapters(), t.ids, bias=t.bias))


def test_an_identity_base():
    t = Mixed(40, 24, 24)
    check(t, lambda: multi_lora_linear(t.x, IDENTITY, t.adapters(), t.ids, bias=t.bias), weight=False)


@pytest.mark.parametrize("name", ["x", *sorted({n for m in METHODS.values() for n in m}), "lora_A", "lora_B"])
def test_one_gradient_alone(name):
    """What no needed gradient reads is not saved, and the one that is needed is the same."""
    t = Mixed(31, 18, 22)
    names = {k: v for k, v in t.named().items() if k.split()[-1] == name}
    _, want = t.exact()
    _, sizes = t.exact(absolute=True)
    for leaf in t.named().values():
        leaf.requires_grad_(any(leaf is v for v in names.values()))
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda s: saved.append(s) or s, lambda s: s):
        y = multi_lora_linear(t.x, t.weight, t.adapters(), t.ids, bias=t.bias)
    for key, g in zip(names, torch.autograd.grad(y, list(names.values()), t.dy)):
        close(g, want[key], sizes[key], key)
    assert any(s is t.x for s in saved) == (name in ("base_in_scale", "delta_in_scale", "lora_A"))
    assert any(s is t.weight for s in saved) == (name in ("x", "base_in_scale"))
    assert any(s.shape == y.shape and s is not t.x for s in saved) == (name == "base_out_scale")


def test_each_row_is_lora_linear_with_its_adapter():
    t = Mixed(60, 40, 50, train=False)
    y = multi_lora_linear(t.x, t.weight, t.adapters(), t.ids, bias=t.bias)
    for i, leaves in enumerate(t.leaves):
        rest = {k: v for k, v in leaves.items() if k not in ("lora_A", "lora_B", "bias")}
        A, B = leaves.get("lora_A", t.x.new_empty(0, 40)), leaves.get("lora_B", t.x.new_empty(50, 0))
        alone = lora_linear(t.x, t.weight, A, B, bias=leaves.get("bias", t.bias), scaling=t.scalings[i], **rest)
        torch.testing.assert_close(y[t.ids == i], alone[t.ids == i])
    nothing = lora_linear(t.x, t.weight, t.x.new_empty(0, 40), t.x.new_empty(50, 0), bias=t.bias)
    assert torch.equal(y[t.ids == -1], nothing[t.ids == -1])


@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_of_a_row_depend_on_nothing_else(monkeypatch, dtype, invariant):
    if invariant:
        monkeypatch.setenv("PEFTKERN_BATCH_INVARIANT", "1")
    t = Mixed(90, 77, 130, dtype=dtype, train=False)
    adapters, (bank, numbers) = t.adapters(), t.bank(torch.float32)

    def run(rows):
        each = []
        for given, ids in ((adapters, t.ids), (bank, numbers)):
            if invariant:
                each.append(multi_lora_linear(t.x[rows], t.weight, given, ids[rows], bias=t.bias))
        if not invariant:
            branch = [a for a in adapters if not isinstance(a, Adapter) or not a.beside()]
            ids = torch.where(t.ids[rows] < 0, -1, t.ids[rows] % len(branch))
            each.append(sgmv(t.x[rows], branch, ids))
        return each

    whole = run(torch.arange(90))
    for count in (1, 2, 7, 40, 90):
        rows = torch.randperm(90)[:count]
        for got, want in zip(run(rows), whole):
            assert torch.equal(got, want[rows]), f"{count} rows"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_bank_gives_what_its_list_gives(dtype):
    t = Mixed(50, 45, 38, dtype=dtype)
    bank, ids = t.bank(torch.float64 if dtype == torch.float64 else torch.float32)
    for leaf in t.named().values():
        leaf.requires_grad_(leaf is t.x)
    got, want = (multi_lora_linear(t.x, t.weight, a, i, bias=t.bias) for a, i in ((bank, ids), (t.adapters(), t.ids)))
    pairs = [(got, want), [torch.autograd.grad(y, t.x, t.dy)[0] for y in (got, want)]]
    for one, other in pairs:
        if dtype == torch.float64:  # by the reference, which multiplies matrices as they lie
            torch.testing.assert_close(one, other)
        else:
            assert torch.equal(one, other)


def test_nan_of_others_reaches_no_row():
    t = Mixed(40, 33, 29, train=False)
    want = multi_lora_linear(t.x, t.weight, t.adapters(), t.ids, bias=t.bias)
    for bad in range(len(t.methods)):
        adapters = t.adapters()
        poisoned = {k: torch.full_like(v, float("nan")) for k, v in t.leaves[bad].items()}
        rest = {k: v for k, v in poisoned.items() if not k.startswith("lora")}
        adapters[bad] = Adapter(poisoned.get("lora_A"), poisoned.get("lora_B"), 1.0, **rest)
        got = multi_lora_linear(t.x, t.weight, adapters, t.ids, bias=t.bias)
        assert torch.equal(got[t.ids != bad], want[t.ids != bad]) and got[t.ids == bad].isnan().all()


def test_compiles_whole():
    t = Mixed(12, 20, 14)

    def step(x, ids):
        return multi_lora_linear(x, t.weight, t.adapters(), ids, bias=t.bias).sin()

    names = t.named()
    want = torch.autograd.grad(step(t.x, t.ids), list(names.values()), t.dy)
    # By inductor test_multi_lora_linear.py compiles.
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(t.x, t.ids), list(names.values()), t.dy)
    torch.testing.assert_close(got, want)


def test_the_branch_alone():
    t = Mixed(30, 21, 26, methods=("lora", "vera", "adalora", "lora"))
    t.leaves[0]["delta_in_scale"] = torch.randn(21).requires_grad_()
    t.weight, t.bias = torch.zeros(26, 21), torch.zeros(26)
    check(t, lambda: sgmv(t.x, t.adapters(), t.ids))
    out = torch.randn(30, 26)
    with torch.no_grad():
        want = out + sgmv(t.x, t.adapters(), t.ids)
        torch.testing.assert_close(sgmv(t.x, t.adapters(), t.ids, out=out.clone()), want)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_shared_columns_of_a_larger_matrix_are_not_copied(dtype):
    """VeRA's A and B, made for the largest layer of a model: neither a copy for each adapter nor one for all."""
    M, K, N, R = 50, 37, 30, 11
    x, weight = (torch.randn(*shape).to(dtype).requires_grad_(i == 0) for i, shape in enumerate(((M, K), (N, K))))
    large_A, large_B = torch.full((R + 2, K + 9), math.nan), torch.full((N + 5, R), math.nan)
    large_A[1 : R + 1, 2 : K + 2], large_B[:N] = torch.randn(R, K), torch.randn(N, R)
    d, b = ([torch.randn(size, requires_grad=True) for _ in range(3)] for size in (R, N))
    ids, dy = torch.arange(M) % 4 - 1, torch.randn(M, N).to(dtype)

    def adapters(like=lambda t: t):
        matrices = [(like(large_A[1 : R + 1, 2 : K + 2]), like(large_B[:N])) for _ in d]
        return [Adapter(*pair, 0.5, rank_scale=r, delta_out_scale=g) for pair, r, g in zip(matrices, d, b)]

    table = table_of(adapters(), x, dtype)
    for whole, mine in ((large_A[1:, 2:], table.weights[::2]), (large_B, table.weights[1::2])):
        assert {w.data_ptr() for w in mine} == {whole.data_ptr()}
    results = []
    for given in (adapters(), adapters(lambda t: t.clone())):
        y = multi_lora_linear(x, weight, given, ids)
        results.append([y, *torch.autograd.grad(y, [x, *d, *b], dy)])
    for got, want in zip(*results):
        assert torch.equal(got, want)
    # In another dtype than any that a kernel reads: one copy for all.
    cast = table_of([*adapters(lambda t: t.half()), Adapter(torch.randn(2, K), torch.randn(N, 2))], x, dtype)
    assert len(set(map(id, cast.weights))) > 4  # not the same tensors
    A, B = large_A[1 : R + 1, 2 : K + 2].half(), large_B[:N].half()
    cast = table_of([*(Adapter(A[:], B[:]) for _ in d), Adapter(torch.randn(2, K), torch.randn(N, 2))], x, dtype)
    assert len(set(map(id, cast.weights))) == 4
    # What trains has a gradient of its own shape.
    A = large_A[1 : R + 1, 2 : K + 2].clone().requires_grad_()
    y = multi_lora_linear(x, weight, [Adapter(A[:, :], large_B[:N])] * 3, ids)
    assert torch.autograd.grad(y, A, dy)[0].isfinite().all()
    wide = large_A.nan_to_num().requires_grad_()
    y = multi_lora_linear(x, weight, [Adapter(wide[:R, :K], large_B[:N])], ids.clamp(max=0))
    assert torch.autograd.grad(y, wide, dy)[0][:R, :K].any()


def test_refusals():
    t = Mixed(4, 20, 13, methods=("lora", "all"), train=False)
    A, B = t.leaves[0]["lora_A"], t.leaves[0]["lora_B"]
    for change, error, words in (
        (dict(rank_scale=torch.ones(4)), ValueError, r"adapters\[1\] rank_scale has shape \(4,\).*\(R,\) = \(3,\)"),
        (dict(base_in_scale=torch.ones(13)), ValueError, r"adapters\[1\] base_in_scale"),
        (dict(base_out_scale=torch.ones(1)), ValueError, r"adapters\[1\] base_out_scale"),
        (dict(bias=torch.ones(12)), ValueError, r"adapters\[1\] bias"),
        (dict(delta_out_scale=torch.ones(13).long()), TypeError, r"adapters\[1\] delta_out_scale"),
        (dict(delta_in_scale=2.0), TypeError, r"adapters\[1\] delta_in_scale"),
        (dict(bias=torch.ones(13, device="meta")), ValueError, r"adapters\[1\] bias is on meta"),
    ):
        with pytest.raises(error, match=words):
            multi_lora_linear(t.x, t.weight, [(A, B, 1.0), Adapter(A, B, **change)], t.ids)
    with pytest.raises(TypeError, match=r"gain is no coefficient.*rank_scale.*bias"):
        Adapter(A, B, gain=torch.ones(3))
    with pytest.raises(TypeError, match="lora_B is given alone"):
        Adapter(lora_B=B)
    with pytest.raises(AttributeError):
        Adapter(A, B).scaling = 2.0
    with pytest.raises(TypeError, match=r"adapters\[0\] scaling"):
        multi_lora_linear(t.x, t.weight, [Adapter(A, B, None)], t.ids)
    for name in ("base_in_scale", "base_out_scale", "bias"):
        adapter = Adapter(A, B, **{name: torch.ones(20 if name == "base_in_scale" else 13)})
        with pytest.raises(ValueError, match=rf"adapters\[1\] {name} acts on the base"):
            sgmv(t.x, [(A, B, 1.0), adapter], t.ids.clamp(max=0))
    bank = AdapterBank(20, 13, max_adapters=2, max_rank=4)
    bank.add("b", A, B, bias=torch.ones(13))
    with pytest.raises(ValueError, match="adapter 'b' bias acts on the base"):
        sgmv(t.x, bank, torch.full((4,), -1))
    bank.remove("b")
    assert not sgmv(t.x, bank, torch.full((4,), -1)).any()
    with pytest.raises(ValueError, match="tell out_features"):
        sgmv(t.x, [Adapter(delta_in_scale=torch.ones(20))], t.ids.clamp(max=0))
