"""The functional forms against their equations in plain torch: forward, every gradient, bad input, dropout by its mask."""

import inspect
import re
from functools import partial

import pytest
import torch
from torch.autograd import forward_ad
from torch.nn.functional import linear

import peftkern
from peftkern.methods import METHODS
from peftkern.methods.low_rank import dora

M, K, N, R = 7, 11, 10, 4
GROUP = 10
OPTIONS = {"RoAd": {"group_size": GROUP}}


def _dora(x, W, b, A, B, m):
    f = m / torch.linalg.norm(W + B @ A, dim=1).detach()
    return f * (linear(x, W) + linear(linear(x, A), B)) + b


def _delora(x, W, b, A, B, strength, w):
    d = strength / R / (A.norm(dim=1) * B.norm(dim=0))
    return linear(x, W, b) + linear(linear(x * w, A) * d, B)


def _tinylora(x, W, b, A, B, P, v):
    return linear(x, W, b) + linear(linear(linear(x, A), (P * v[:, None, None]).sum(0)), B)


def _osf(x, W, b, U, S, V, U_0, S_0, V_0):
    return linear(x, W + (U * S) @ V - (U_0 * S_0) @ V_0, b)


def _miss(x, W, b, block):
    padded = torch.nn.functional.pad(x, (0, -K % R))
    return linear(x, W, b) + padded.view(M, -1, R).sum(1) @ block


def _unilora(x, W, b, theta, i_A, i_B, c_A, c_B):
    return linear(x, W, b) + linear(linear(x, theta[i_A] * c_A), theta[i_B] * c_B)


def _lokr(x, W, b, w1, w2):
    return linear(x, W + torch.kron(w1, w2), b)


def _c3a(x, W, b, w):
    blocks = [[torch.stack([v.roll(t) for t in range(len(v))]) for v in row] for row in w]
    return linear(x, W + torch.cat([torch.cat(row, 1) for row in blocks]) / K, b)


def _vblora(x, W, b, l_A, l_B, bank):
    def mixed(logits):
        values, kept = logits.topk(2)  # of equal ones as many as it takes
        return (torch.softmax(values, -1)[..., None] * bank[kept]).sum(-2)

    return linear(x, W, b) + linear(linear(x, mixed(l_A).flatten(1)), mixed(l_B).mT.flatten(0, 1))


def _lily(x, W, b, A, B, router):
    p = torch.softmax(x @ A.t() @ router.t(), 1).mean(0)
    return linear(x, W, b) + x @ A.t() @ sum(p_e * B_e for p_e, B_e in zip(p, B.split(R)))


def _hra(x, W, b, u):
    for i in range(R):
        v = u[:, i] / u[:, i].norm()
        W = W - 2 * torch.outer(W @ v, v)
    return linear(x, W, b)


def _gralora(x, W, b, A, B):
    k, s = A.shape[0], R // A.shape[0]
    y = []
    for j in range(k):
        ranks = [x.view(M, k, -1)[:, i] @ A[i][:, j * s : j * s + s] for i in range(k)]
        y.append(torch.cat(ranks, 1) @ B[j])
    return linear(x, W, b) + torch.cat(y, 1)


def _randlora(x, W, b, A, B, strength, gamma):
    small = torch.stack([strength[k, c] * A[k, 0, :N] * gamma[c] for k in range(R) for c in range(3)])
    return linear(x, W + (B[:K, :3].flatten(1) @ small).t(), b)


def _deft(x, W, b, P, into):
    Q = torch.linalg.qr(P.double())[0].to(P.dtype)
    return linear(x, W - Q @ (Q.t() @ W) + Q @ into, b)


def _at(indices, values, shape):
    return values.new_zeros(shape).index_put(tuple(indices), values, accumulate=True)


def _fourierft(x, W, b, c, indices):
    dense = _at(indices, c, (N, K))
    change = torch.fft.ifft2(dense if dense.dtype.itemsize > 2 else dense.float()).real
    return linear(x, W + change.to(W.dtype), b)


def _synthesis(size, filters):
    # (size, P): what a coefficient, the low ones first, adds to the numbers of a side.
    L = filters.shape[1]
    P = size + L - 2 + (size + L) % 2
    T = filters.new_zeros((P + L - 2, P))
    for i in range(P // 2):
        column = torch.arange(2 * i, 2 * i + L)
        for half, taps in enumerate(filters):
            T = T.index_put((column, torch.tensor(i + half * (P // 2))), taps)
    return T[L - 2 : L - 2 + size]


def _waveft(x, W, b, c, indices, filters):
    T, U = _synthesis(N, filters), _synthesis(K, filters)
    (P, Q), (i, j) = (t.shape[1] for t in (T, U)), indices
    i, j = i + (P - N) // 2, j + (Q - K) // 2
    at = i % (P // 2) + P // 2 * (j // (Q // 2)), j % (Q // 2) + Q // 2 * (i // (P // 2))
    return linear(x, W + T @ _at(at, c, (P, Q)) @ U.t(), b)


def _peanut(x, W, b, A, B, encoder, decoder):
    first = torch.relu(W.t() @ A.t())
    h = torch.relu(linear(torch.relu(linear(first, encoder)), decoder)) + first
    return linear(x, W, b) + linear(linear(x, h.t()), B)


def _oft(x, W, b, upper):
    i, j = torch.triu_indices(K, K, 1)
    Q = upper.new_zeros(K, K).index_put((i, j), upper[0])
    Q = Q - Q.t()
    return linear(x @ (torch.eye(K, dtype=Q.dtype) + 2 * (Q + Q @ Q + Q @ Q @ Q) + Q @ Q @ Q @ Q), W, b)


def _boft(x, W, b, blocks, s):
    Q, eye = 0.5 * (blocks - blocks.transpose(-1, -2))[0, 0], torch.eye(K, dtype=torch.float64)
    R = (eye - Q) @ torch.linalg.inv(eye + Q)
    return s.flatten() * linear(x @ R.to(x.dtype), W) + b


def _road(x, W, b, theta, alpha):
    h = linear(x, W, b).view(M, -1, 2, GROUP // 2)
    theta, alpha = (t.view(-1, 1, GROUP // 2).to(h.dtype) for t in (theta, alpha))
    rotated = torch.stack([-h[:, :, 1], h[:, :, 0]], 2)
    return (h * alpha * theta.cos() + rotated * alpha * theta.sin()).flatten(1)


# Name -> the equation, and the shapes of the method's tensors; a number instead: indices below it;
# a list: of a tensor without a gradient.
FORMS = {
    "DoRA": (_dora, [(R, K), (N, R), (N,)]),
    "VeRA": (
        lambda x, W, b, A, B, d, g: linear(x, W, b) + g * linear(linear(x, A[:, :K]) * d, B[:N]),
        [(R, K + 3), (N + 2, R), (R,), (N,)],
    ),
    "AdaLoRA": (lambda x, W, b, A, B, E: linear(x, W + B @ (A * E), b), [(R, K), (N, R), (R, 1)]),
    "DeLoRA": (_delora, [(R, K), (N, R), (1,), (K,)]),
    "TinyLoRA": (_tinylora, [(R, K), (N, R), (3, R, R), (3,)]),
    "OSF": (_osf, [(N, R), (R,), (R, K)] * 2),
    "MiSS": (_miss, [(R, N)]),
    "Uni-LoRA": (_unilora, [(20,), ((R, K), 20), ((N, R), 20), (R, K), (N, R)]),
    "PSOFT": (
        lambda x, W, b, A, B, Q: linear(x, W + B @ (Q - torch.eye(R)).to(B.dtype) @ A, b),
        [(R, K), (N, R), (R, R)],
    ),
    "GraLoRA": (_gralora, [(1, K, R), (1, R, N)]),
    "RandLoRA": (_randlora, [[R, 1, N + 1], [K + 2, 4, R], (R, 3), (3, N)]),
    "DEFT": (_deft, [(N, R), (R, K)]),
    "LoHa": (lambda x, W, b, p, q, s, t: linear(x, W + (p @ q) * (s @ t), b), [(N, R), (R, K)] * 2),
    "LoKr": (_lokr, [(2, 1), (5, K)]),
    "C3A": (_c3a, [(N, K, 1)]),
    "VB-LoRA": (_vblora, [(R, K, 6), (N, R, 6), (6, 1)]),
    "Lily": (_lily, [(R, K), (3 * R, N), (3, R)]),
    "HRA": (_hra, [(K, R)]),
    "HiRA": (lambda x, W, b, A, B: linear(x, W + W * (B @ A), b), [(R, K), (N, R)]),
    "SHiRA": (lambda x, W, b, c, indices: linear(x, W + _at(indices, c, (N, K)), b), [(20,), ((2, 20), N)]),
    "FourierFT": (_fourierft, [(20,), ((2, 20), N)]),
    "WaveFT": (_waveft, [(20,), ((2, 20), N), (2, 4)]),
    "PEANuT": (_peanut, [(R, N), (N, R), (R, R), (R, R)]),
    "OFT": (_oft, [(1, K * (K - 1) // 2)]),
    "BOFT": (_boft, [(1, 1, K, K), (N, 1)]),
    "RoAd": (_road, [(N // 2,), (N // 2,)]),
    "(IA)^3": (lambda x, W, b, g: g * linear(x, W, b), [(N,)]),
    "SSF": (lambda x, W, b, g, shift: g * linear(x, W, b) + shift, [(N,), (N,)]),
}


DROPS = [name for name in FORMS if "dropout_p" in inspect.signature(METHODS[name].function).parameters]


def function_of(name):
    return partial(METHODS[name].function, **OPTIONS.get(name, {}))


def _tensors(shapes, dtype):
    made = []
    for shape in shapes:
        if isinstance(shape[0], tuple):
            made.append(torch.randint(shape[1], shape[0]))
        else:
            made.append(torch.randn(shape, dtype=dtype).requires_grad_(isinstance(shape, tuple)))
    return made


def case_of(name, dtype=torch.float64):
    equation, shapes = FORMS[name]
    x, b = (torch.randn(shape, dtype=dtype).requires_grad_() for shape in ((M, K), (N,)))
    return equation, x, torch.randn(N, K, dtype=dtype), b, _tensors(shapes, dtype)


def test_every_function_has_a_form():
    assert FORMS.keys() == {name for name, method in METHODS.items() if method.function is not None}
    for method in METHODS.values():
        if method.function is not None:
            assert getattr(peftkern, method.function.__name__) is method.function


@pytest.mark.parametrize("name", FORMS)
def test_equation_and_gradients(name):
    equation, x, W, b, tensors = case_of(name)
    function = function_of(name)

    def ours(x, b, *tensors):
        return function(x, W, *tensors, bias=b)

    inputs = [t for t in (x, b, *tensors) if t.requires_grad]
    y, expected = ours(x, b, *tensors), equation(x, W, b, *tensors)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    dy = torch.randn_like(y)
    for got, want in zip(*(torch.autograd.grad(t, inputs, dy) for t in (y, expected)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", FORMS)
def test_gradcheck(name, monkeypatch):
    _, x, W, b, tensors = case_of(name)
    function = function_of(name)
    if name == "DoRA":  # whose norm is a constant of the graph: it must not move with the weights
        norm = dora.row_norm(W, *tensors[:2])
        monkeypatch.setattr(dora, "row_norm", lambda *args: norm)
    assert torch.autograd.gradcheck(lambda x, b, *t: function(x, W, *t, bias=b), (x, b, *tensors))
    if name in DROPS:
        options = {"dropout_p": 0.4, "training": True, "seed": 5}
        assert torch.autograd.gradcheck(lambda x, b, *t: function(x, W, *t, bias=b, **options), (x, b, *tensors))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FORMS)
def test_other_dtypes(name, dtype):
    equation, x, W, b, tensors = case_of(name, dtype)
    exact = [t.detach().double() if t.is_floating_point() else t for t in (x, W, b, *tensors)]
    y = function_of(name)(x, W, *tensors, bias=b)
    assert y.dtype == dtype
    expected, stock = equation(*exact), equation(x, W, b, *tensors)
    error, allowed = ((t.double() - expected).norm().item() for t in (y, stock))
    assert error <= max(1.5 * allowed, 4 * expected.norm().item() * torch.finfo(dtype).eps)
    y.sum().backward()
    assert all(t.grad.dtype == dtype for t in (x, b, *tensors) if t.requires_grad)


@pytest.mark.parametrize("name", FORMS)
def test_no_tangent_is_dropped(name):
    # Forward-mode AD raises, or is torch's own all the way.
    equation, x, W, b, tensors = case_of(name)
    given = [t.detach() for t in (x, W, b, *tensors)]
    for i, t in enumerate(given):
        if not t.is_floating_point() or (name == "DoRA" and i != 0):  # whose norm is a constant
            continue
        with forward_ad.dual_level():
            x, W, b, *tensors = (forward_ad.make_dual(v, torch.ones_like(v)) if v is t else v for v in given)
            try:
                y = function_of(name)(x, W, *tensors, bias=b)
            except NotImplementedError:
                continue
            got, want = (forward_ad.unpack_dual(v).tangent for v in (y, equation(x, W, b, *tensors)))
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", DROPS)
def test_dropout_by_its_mask(name):
    equation, x, W, b, tensors = case_of(name)
    keep = peftkern.dropout_mask(M, K, 0.4, 5)
    y = function_of(name)(x, W, *tensors, bias=b, dropout_p=0.4, training=True, seed=5)
    dropped = x * keep / 0.6
    if name == "DoRA":
        A, B, m = tensors
        f = m / torch.linalg.norm(W + B @ A, dim=1).detach()
        expected = linear(x, W, b) + (f - 1) * linear(dropped, W) + f * linear(linear(dropped, A), B)
    elif name == "DEFT":  # what is taken out is not dropped
        (P, into), none = tensors, torch.zeros(R, K, dtype=x.dtype)
        put_in = equation(dropped, W, b, P, into) - equation(dropped, W, b, P, none)
        expected = equation(x, W, b, P, none) + put_in
    else:
        expected = linear(x, W, b) + equation(dropped, W, b, *tensors) - linear(dropped, W, b)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    inputs = [t for t in (x, b, *tensors) if t.requires_grad]
    dy = torch.randn_like(y)
    for got, want in zip(*(torch.autograd.grad(t, inputs, dy) for t in (y, expected)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    assert torch.equal(
        function_of(name)(x, W, *tensors, bias=b, dropout_p=0.4), function_of(name)(x, W, *tensors, bias=b)
    )


@pytest.mark.parametrize("name", FORMS)
def test_bad_input_is_named(name):
    _, x, W, b, tensors = case_of(name)
    with pytest.raises(ValueError, match="x has shape"):
        function_of(name)(x[:, :-1], W, *tensors, bias=b)
    with pytest.raises(ValueError, match="bias"):
        function_of(name)(x, W, *tensors, bias=b[:-1])
    with pytest.raises(ValueError, match="weight requires grad"):
        function_of(name)(x, W.clone().requires_grad_(), *tensors, bias=b)


def _parts(name, tensors):
    # The tensors by the names of their parameters.
    names = list(inspect.signature(METHODS[name].function).parameters)[2:]
    if "layers" in names:
        names[names.index("layers") :] = [f"layers[{i}]" for i in range(len(tensors))]
    return dict(zip(names, tensors))


# Dimensions whose size is the method's to choose.
FREE = {"MiSS": (0, 1), "HRA": (1,)}


@pytest.mark.parametrize("name", FORMS)
def test_nothing_is_broadcast(name):
    _, x, W, b, tensors = case_of(name, torch.float32)
    parts = _parts(name, tensors)
    for part, t in parts.items():
        rows = [t.narrow(d, 0, 1) for d in range(t.dim()) if t.shape[d] > 1 and d not in FREE.get(name, ())]
        for wrong in (t[None], *rows):
            given = [wrong if each is t else each for each in tensors]
            with pytest.raises(ValueError, match="|".join(map(re.escape, parts))):
                function_of(name)(x, W, *given, bias=b)
        with pytest.raises(TypeError, match=re.escape(part)):
            function_of(name)(x, W, *(each.bool() if each is t else each for each in tensors), bias=b)
    with pytest.raises(ValueError, match="bias has shape"):
        function_of(name)(x, W, *tensors, bias=b[:1])


@pytest.mark.parametrize("name", [name for name in FORMS if any(isinstance(s[0], tuple) for s in FORMS[name][1])])
def test_numbers_out_of_range(name):
    _, x, W, b, tensors = case_of(name, torch.float32)
    for part, t in _parts(name, tensors).items():
        for wrong in () if t.is_floating_point() else (t + 40, t - 30):
            with pytest.raises(ValueError, match=f"{part} has numbers from"):
                function_of(name)(x, W, *(wrong if each is t else each for each in tensors), bias=b)


# Numbers that are no tensors: what is refused, by type and by size.
NUMBERS = {
    "OFT": ("terms", (2.5, "5", True), (0, -1, 10**9)),
    "VB-LoRA": ("top_k", (2.0, "2", True, None), (0, -1, 7)),
    "RoAd": ("group_size", (2.0, "2", True, None), (0, -2, 3, 10**9)),
    "DEFT": ("method", (), ("rel", None, 1)),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_that_make_no_sense(name):
    _, x, W, b, tensors = case_of(name, torch.float32)
    option, kinds, sizes = NUMBERS[name]
    for error, values in ((TypeError, kinds), (ValueError, sizes)):
        for value in values:
            with pytest.raises(error, match=f"^{option} "):
                function_of(name)(x, W, *tensors, bias=b, **{option: value})


@pytest.mark.parametrize("name", FORMS)
def test_second_derivatives_raise(name):
    _, x, W, b, tensors = case_of(name)
    y = function_of(name)(x, W, *tensors, bias=b)
    inputs = [t for t in (x, *tensors) if t.requires_grad]
    # Of a gradient of the output that requires none, too.
    for loss in (y.sum(), y.square().sum()):
        with pytest.raises(RuntimeError, match="has no second derivative"):
            torch.autograd.grad(loss, inputs, create_graph=True, allow_unused=True)
