"""Bad input: each case raises TypeError or ValueError naming the argument, from the function and from the ops."""

import pytest
import torch

from peftkern import LoRALinear, lora_linear

M, K, N, R = 4, 10, 6, 3


def good() -> dict:
    return dict(x=torch.randn(M, K), weight=torch.randn(N, K), lora_A=torch.randn(R, K), lora_B=torch.randn(N, R))


CASES = {
    "x is a list": (dict(x=[1.0]), TypeError, "x "),
    "x is integer": (dict(x=torch.ones(M, K, dtype=torch.int64)), TypeError, "x "),
    "x is complex": (dict(x=torch.ones(M, K, dtype=torch.complex64)), TypeError, "x "),
    "x is bool": (dict(x=torch.ones(M, K, dtype=torch.bool)), TypeError, "x "),
    "x has other in_features": (dict(x=torch.randn(M, K + 1)), ValueError, "x "),
    "x is a scalar": (dict(x=torch.tensor(1.0)), ValueError, "x "),
    "x is sparse": (dict(x=torch.randn(M, K).to_sparse()), TypeError, "x "),
    "x has other dtype": (dict(x=torch.randn(M, K).half()), TypeError, "weight"),
    "weight is 1-D": (dict(weight=torch.randn(K)), ValueError, "weight"),
    "weight is 3-D": (dict(weight=torch.randn(1, N, K)), ValueError, "weight"),
    "weight is None": (dict(weight=None), TypeError, "weight"),
    "weight is int8": (dict(weight=torch.ones(N, K, dtype=torch.int8)), TypeError, "weight"),
    "weight requires grad": (
        dict(weight=torch.randn(N, K, requires_grad=True)),
        ValueError,
        "weight requires grad",
    ),
    "weight is elsewhere": (dict(weight=torch.empty(N, K, device="meta")), ValueError, "weight is on meta"),
    "lora_A has other K": (dict(lora_A=torch.randn(R, K - 1)), ValueError, "lora_A"),
    "lora_A is 1-D": (dict(lora_A=torch.randn(K)), ValueError, "lora_A"),
    "lora_A is fp64": (dict(lora_A=torch.randn(R, K).double()), TypeError, "lora_A"),
    "lora_A is transposed": (dict(lora_A=torch.randn(K, R)), ValueError, "lora_A"),
    "lora_B has other N": (dict(lora_B=torch.randn(N + 1, R)), ValueError, "lora_B"),
    "lora_B has other R": (dict(lora_B=torch.randn(N, R + 1)), ValueError, "lora_B"),
    "lora_B is integer": (dict(lora_B=torch.ones(N, R, dtype=torch.int32)), TypeError, "lora_B"),
    "bias has other N": (dict(bias=torch.randn(N + 1)), ValueError, "bias"),
    "bias is 2-D": (dict(bias=torch.randn(1, N)), ValueError, "bias"),
    "bias is integer": (dict(bias=torch.ones(N, dtype=torch.int64)), TypeError, "bias"),
    "bias is a number": (dict(bias=1.0), TypeError, "bias"),
    "rank_scale has other R": (dict(rank_scale=torch.randn(R + 1)), ValueError, "rank_scale"),
    "base_in_scale has size N": (dict(base_in_scale=torch.randn(N)), ValueError, "base_in_scale"),
    "delta_in_scale has size N": (dict(delta_in_scale=torch.randn(N)), ValueError, "delta_in_scale"),
    "base_out_scale has size K": (dict(base_out_scale=torch.randn(K)), ValueError, "base_out_scale"),
    "delta_out_scale has size K": (dict(delta_out_scale=torch.randn(K)), ValueError, "delta_out_scale"),
    "scaling is a string": (dict(scaling="2"), TypeError, "scaling"),
    "scaling is None": (dict(scaling=None), TypeError, "scaling"),
    "scaling has two elements": (dict(scaling=torch.ones(2)), ValueError, "scaling"),
    "scaling is an integer tensor": (dict(scaling=torch.tensor(2)), TypeError, "scaling"),
    "scaling is elsewhere": (dict(scaling=torch.ones(1, device="meta")), ValueError, "scaling is on meta"),
    "dropout_p is 1": (dict(dropout_p=1.0, training=True), ValueError, "dropout_p"),
    "dropout_p is 1, not training": (dict(dropout_p=1.0), ValueError, "dropout_p"),
    "dropout_p is negative": (dict(dropout_p=-0.1, training=True), ValueError, "dropout_p"),
    "dropout_p is NaN": (dict(dropout_p=float("nan"), training=True), ValueError, "dropout_p"),
    "dropout_p is a tensor": (dict(dropout_p=torch.tensor(0.1), training=True), TypeError, "dropout_p"),
    "seed is a float": (dict(seed=1.0, dropout_p=0.1, training=True), TypeError, "seed"),
    "seed is int32": (
        dict(seed=torch.tensor([1], dtype=torch.int32), dropout_p=0.1, training=True),
        TypeError,
        "seed",
    ),
    "seed has two elements": (
        dict(seed=torch.tensor([1, 2]), dropout_p=0.1, training=True),
        ValueError,
        "seed",
    ),
    "seed is elsewhere": (
        dict(seed=torch.empty(1, dtype=torch.int64, device="meta"), dropout_p=0.1, training=True),
        ValueError,
        "seed is on meta",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_function(case):
    change, error, words = CASES[case]
    arguments = good() | change
    positional = [arguments.pop(k) for k in ("x", "weight", "lora_A", "lora_B")]
    with pytest.raises(error, match=words):
        lora_linear(*positional, **arguments)


def op_arguments(name: str) -> dict:
    x, w, a, b = good().values()
    dy, u = torch.randn(M, N), torch.randn(M, R)
    if name == "lora_linear_bwd_adapter":
        needs = dict.fromkeys(("need_A", "need_B", "need_bias", "need_rank", "need_p_d", "need_g_b", "need_g_d"), True)
        return dict(dy=dy, x=x, u=u, h=dy.clone(), lora_A=a, lora_B=b, scaling=1.0, p=0.0, seed=None,
                    rank_scale=torch.ones(R), delta_in_scale=None, delta_out_scale=None, **needs)  # fmt: skip
    return dict(dy=dy, du=u, x=x, weight=w, lora_A=a, p=0.0, seed=None,
                base_in_scale=None, delta_in_scale=None, base_out_scale=None, need_base_in=True)  # fmt: skip


OP_CASES = [
    ("lora_linear_bwd_adapter", dict(dy=torch.randn(M, N + 1)), "dy "),
    ("lora_linear_bwd_adapter", dict(x=torch.randn(M + 1, K)), "x "),
    ("lora_linear_bwd_adapter", dict(x=None), "x "),
    ("lora_linear_bwd_adapter", dict(u=torch.randn(M - 1, R)), "u "),
    ("lora_linear_bwd_adapter", dict(h=None), "h "),
    ("lora_linear_bwd_adapter", dict(p=0.5), "seed"),
    ("lora_linear_bwd_adapter", dict(rank_scale=torch.ones(R + 1)), "rank_scale"),
    ("lora_linear_bwd_input", dict(du=torch.randn(M, R + 1)), "du "),
    ("lora_linear_bwd_input", dict(dy=torch.randn(N)), "dy "),
    ("lora_linear_bwd_input", dict(weight=torch.randn(N, K - 1)), "lora_A"),
    ("lora_linear_bwd_input", dict(x=None), "x "),
    ("lora_linear_bwd_input", dict(lora_A=torch.randn(R)), "lora_A"),
]


@pytest.mark.parametrize("name, change, words", OP_CASES)
def test_ops_check_before_any_kernel(name, change, words):
    with pytest.raises((ValueError, TypeError), match=words):
        getattr(torch.ops.peftkern, name)(*(op_arguments(name) | change).values())


LAYER_CASES = [
    (dict(r=0), ValueError, "r "),
    (dict(r=-1), ValueError, "r "),
    (dict(r=2.0), TypeError, "r "),
    (dict(r=True), TypeError, "r "),
    (dict(lora_alpha="16"), TypeError, "lora_alpha"),
    (dict(lora_dropout=1.0), ValueError, "lora_dropout"),
    (dict(lora_dropout=-0.5), ValueError, "lora_dropout"),
    (dict(lora_dtype=torch.float16), TypeError, "lora_dtype"),
    (dict(use_dora=True), NotImplementedError, "DoRA"),
]


@pytest.mark.parametrize("options, error, words", LAYER_CASES)
def test_layer(options, error, words):
    with pytest.raises(error, match=words):
        LoRALinear(4, 5, **options)
    with pytest.raises(TypeError, match="linear"):
        LoRALinear.from_linear(torch.nn.ReLU())
