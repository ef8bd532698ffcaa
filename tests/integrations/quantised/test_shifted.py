"""Weights in 4 bits with a shift for each group: quanto's qint4 and torchao's Int4Tensor, whose codes are shared."""

from __future__ import annotations

import pytest
import torch
from optimum.quanto import MaxOptimizer, WeightQBitsTensor, qint2, qint4
from optimum.quanto.tensor.weights.marlin import MarlinF8QBytesTensor
from optimum.quanto.tensor.weights.tinygemm import TinyGemmWeightQBitsTensor
from torch import nn
from torchao.quantization import Int4Tensor
from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import to_nf4

from peftkern import LoRALinear, lora_linear
from peftkern.bases.affine import scale_and_zero
from peftkern.bases.base import base_of, kind_of
from peftkern.testing.accuracy import judged

N, R = 48, 4
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def random(*shape, dtype=F32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def qint4_weight(K=96, group=32, dtype=F32, zeropoint=False, qtype=qint4, axis=0, W=None, optimized=False):
    W = random(N, K, dtype=dtype) if W is None else W
    scale, shift = MaxOptimizer()(W, qtype, axis, group, zeropoint=zeropoint)
    return WeightQBitsTensor.quantize(W, qtype, axis, group, scale, shift, optimized)


def packed(q):
    """Pairs of neighbours of whole numbers from -8 to 7, the first in the lower bits."""
    q = q.to(torch.uint8) & 15
    return (q[..., 0::2] | q[..., 1::2] << 4).view(torch.int8)


def int4_tensor(K=96, group=32, dtype=F32, **options):
    # torchao makes them by a package for GPUs.
    q = torch.randint(-8, 8, (N, K), generator=torch.Generator().manual_seed(0))
    scale, zero = 0.01 + random(K // group, N, seed=1).abs(), random(K // group, N, seed=2)
    return Int4Tensor(packed(q), scale.to(dtype), zero.to(dtype), [1, group], torch.Size((N, K)), **options)


def stated(weight, dtype):
    """W by the equation of its library, computed in ``dtype``."""
    if isinstance(weight, Int4Tensor):
        q = torch.stack((weight.qdata << 4 >> 4, weight.qdata >> 4), dim=-1).flatten(-2)
        scale, zero = (
            t.to(dtype).t().repeat_interleave(weight.block_size[1], 1) for t in (weight.scale, weight.zero_point)
        )
        return q.to(dtype) * scale + zero
    q, scale, shift = (t.to(dtype) for t in (weight._data.unpack(), weight._scale, weight._shift))
    return ((q * scale - shift) if weight._shift.is_floating_point() else (q - shift) * scale).reshape(weight.shape)


def run(product, leaves, dy):
    leaves = {name: t.detach().requires_grad_() for name, t in leaves.items()}
    y = product(*leaves.values())
    return {"y": y.detach()} | dict(
        zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype)), strict=True)
    )


def eager(W):
    return lambda x, A, B: x @ W.t() + 0.5 * (x @ A.t()) @ B.t()


WEIGHTS = {
    "quanto, a group a row": lambda dtype: qint4_weight(96, None, dtype),
    "quanto, groups of 32": lambda dtype: qint4_weight(96, 32, dtype),
    "quanto, groups of 128": lambda dtype: qint4_weight(256, 128, dtype),
    "quanto, whole shifts": lambda dtype: qint4_weight(96, 32, dtype, zeropoint=True),
    "torchao, groups of 32": lambda dtype: int4_tensor(96, 32, dtype),
    "torchao, groups of 128": lambda dtype: int4_tensor(256, 128, dtype),
}


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("rows", [3, 70])
@pytest.mark.parametrize("name", WEIGHTS)
def test_output_and_gradients(name, rows, dtype):
    """Beside the dequantised weight in eager PyTorch, by the rule of peftkern/testing/accuracy.py."""
    weight = WEIGHTS[name](dtype)
    K = weight.shape[1]
    sizes = {"x": (rows, K), "A": (R, K), "B": (N, R)}
    leaves = {n: random(*size, dtype=dtype, seed=i) for i, (n, size) in enumerate(sizes.items(), 5)}
    dy = random(rows, N, dtype=dtype, seed=9)
    W, double = stated(weight, torch.float64), {n: t.double() for n, t in leaves.items()}
    ours = run(lambda x, A, B: lora_linear(x, weight, A, B, scaling=0.5), leaves, dy)
    theirs, exact = run(eager(stated(weight, dtype)), leaves, dy), run(eager(W), double, dy.double())
    absolute = run(eager(W.abs()), {n: t.abs() for n, t in double.items()}, dy.double().abs())
    bad = [r for r in (judged(n, ours[n], theirs[n], exact[n], absolute[n]) for n in exact) if not r.ok]
    assert not bad, "\n".join(f"{r.ratio:.2f} {r}" for r in bad)


@pytest.mark.parametrize("name", WEIGHTS)
def test_codes_are_shared_and_scales_are_made_once(name):
    weight = WEIGHTS[name](F32)
    base, again = base_of(weight), base_of(weight)
    codes = weight.qdata if isinstance(weight, Int4Tensor) else weight._data._data
    assert base.kind == ("int4" if isinstance(weight, Int4Tensor) else "quanto4") and base.shape == weight.shape
    assert base.tensors[0].data_ptr() == codes.data_ptr() and base.tensors[0].nbytes == codes.nbytes
    assert base.tensors[1] is again.tensors[1] and base.tensors[2] is again.tensors[2]
    if not isinstance(weight, Int4Tensor):
        torch.testing.assert_close(stated(weight, F32), weight.dequantize())


def held(weight):
    base = base_of(weight)
    return kind_of(base.kind).dequantise(base.tensors, torch.float64, base.shape)


def agrees(weight):
    torch.testing.assert_close(held(weight), stated(weight, torch.float64), rtol=1e-6, atol=1e-6)


def other_memory(t):
    t.data = t.data * 3.0


CHANGES = {
    "scale in place": lambda w: (w.scale if isinstance(w, Int4Tensor) else w._scale).mul_(2.0),
    "shift in place": lambda w: (w.zero_point if isinstance(w, Int4Tensor) else w._shift).add_(1.0),
    "another scale": lambda w: setattr(w, *(("scale", w.scale * 2) if isinstance(w, Int4Tensor) else ("_scale", w._scale * 2))),
    "another shift": lambda w: setattr(
        w, *(("zero_point", w.zero_point * 2) if isinstance(w, Int4Tensor) else ("_shift", w._shift * 2))
    ),
    "other memory": lambda w: other_memory(w.zero_point if isinstance(w, Int4Tensor) else w._shift),
    "codes": lambda w: (w.qdata if isinstance(w, Int4Tensor) else w._data._data).copy_(
        random(*(w.qdata if isinstance(w, Int4Tensor) else w._data._data).shape).mul(40)
    ),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("make", [qint4_weight, int4_tensor])
def test_a_change_is_seen(make, change):
    weight = make()
    before = held(weight)
    agrees(weight)
    CHANGES[change](weight)
    agrees(weight)
    assert not torch.allclose(before, held(weight), atol=1e-2)


def test_groups_of_equal_elements():
    """Their scale is 0 and their shift is all there is."""
    W = random(N, 96)
    W[0], W[1], W[2, :32], W[3, :32] = 0.0, 0.75, -3e4, 1e-30
    weight = qint4_weight(W=W)
    assert (weight._scale == 0).sum() == 8
    agrees(weight)
    assert torch.equal(held(weight)[0], torch.zeros(96).double()) and torch.equal(held(weight)[1], W[1].double())
    y = lora_linear(torch.eye(96), weight, torch.zeros(R, 96), torch.zeros(N, R))
    torch.testing.assert_close(y.t(), W, rtol=1e-6, atol=0.25)
    assert torch.equal(y.t()[[1, 2, 3]][:, :32], W[[1, 2, 3]][:, :32])


def test_scales_of_any_size():
    q, scale = torch.arange(16.0).double(), torch.tensor([0.0, 1e-30, 1e-12, 1e-3, 1.0])
    for shift in (0.0, 1e-20, 1e-3, 7.5, -1e4):
        s, zero = scale_and_zero(scale, torch.full_like(scale, shift))
        found = (q[:, None] - zero.double()) * s.double()
        torch.testing.assert_close(found, q[:, None] * scale.double() - shift, rtol=2e-7, atol=2e-7 * abs(shift))


def test_in_a_module():
    """PEFT has no layer over an Int4Tensor, ``LoRALinear`` is one."""
    linear = nn.Linear(96, N)
    linear.weight = nn.Parameter(int4_tensor(), requires_grad=False)
    ours = LoRALinear.from_linear(linear, R)
    nn.init.normal_(ours.lora_B)
    plain = nn.Linear(96, N)
    plain.weight.data, plain.bias.data = stated(linear.weight, F32), linear.bias.data
    dense = LoRALinear.from_linear(plain, R)
    dense.load_state_dict({k: v for k, v in ours.state_dict().items() if "lora" in k}, strict=False)
    found = []
    for module in (ours, dense):
        x = random(5, 96).requires_grad_()
        y = module(x)
        found.append((y, *torch.autograd.grad(y.square().sum(), (x, module.lora_A, module.lora_B))))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


def test_a_weight_that_quanto_has_repacked():
    weight = qint4_weight(256, 128, BF16, optimized=True)
    assert type(weight) is TinyGemmWeightQBitsTensor
    with pytest.raises(ValueError, match=r"repacked this weight .* weight.weight_qbits_tensor\(\) is the same weight"):
        base_of(weight)
    agrees(weight.weight_qbits_tensor())


def odd():
    return qint4_weight(W=random(5, 96))


def deep():
    weight = int4_tensor()
    parts = (weight.qdata, weight.scale, weight.zero_point)
    return Int4Tensor(*(t[None] for t in parts), [1, 1, 32], torch.Size((1, N, 96)))


def marlin():
    # quanto makes them on GPUs; the class is what is refused.
    return torch.zeros(N, 96).as_subclass(MarlinF8QBytesTensor)


REFUSED = {
    "Marlin": (marlin, "repacked this weight in qfloat8 for its Marlin kernel"),
    "2 bits": (lambda: qint4_weight(qtype=qint2), r"is qint2 of shape \(48, 96\) along axis 0"),
    "columns": (lambda: qint4_weight(axis=-1, group=None), r"is qint4 of shape \(48, 96\) along axis -1"),
    "an odd number of groups": (odd, "has 15 groups, so that half of the last row of codes is empty"),
    "rounded inputs": (lambda: int4_tensor(activation_dtype=torch.float8_e4m3fn), "rounds its input to torch.float8_e4m3fn"),
    "scaled inputs": (lambda: int4_tensor(act_pre_scale=torch.ones(96)), "scales its input"),
    "transposed": (lambda: int4_tensor().transpose(0, 1), r"has scales for blocks of \[32, 1\]"),
    "experts": (deep, r"has shape \(1, 48, 96\): kind int4 is a matrix"),
    "NF4Tensor": (lambda: to_nf4(random(128, 128), 64, 256), "its 16 values are rounded to four decimals"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    make, words = REFUSED[case]
    with pytest.raises(ValueError, match=words):
        base_of(make())
