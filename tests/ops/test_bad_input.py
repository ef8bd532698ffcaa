"""Bad input: each case raises TypeError or ValueError naming the argument, from the function and from the ops."""

import pytest
import torch

from peftkern import (
    AdapterBank,
    BottleneckAdapter,
    LoRALinear,
    bottleneck_adapter,
    fourierft_linear,
    loha_linear,
    lora_linear,
    multi_lora_linear,
    shira_linear,
    waveft_linear,
)  # fmt: skip
from peftkern.autograd.row_norm import row_norm
from peftkern.equation import Needs
from peftkern.testing.arguments import backward, forward

ops = torch.ops.peftkern

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
    "scaling is beyond floats": (dict(scaling=10**400), ValueError, "scaling"),
    "dropout_p is beyond floats": (dict(dropout_p=10**5000), ValueError, "dropout_p"),
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


FULL = dict(
    dy=torch.randn(M, N), x=torch.randn(M, K), u=torch.randn(M, R), h=torch.randn(M, N), weight=torch.randn(N, K),
    lora_A=torch.randn(R, K), lora_B=torch.randn(N, R), needs=Needs._fields, d=torch.ones(R),
)  # fmt: skip
BACKWARD_CASES = {
    "dy has other N": (dict(dy=torch.randn(M, N + 1)), "dy "),
    "dy is 1-D": (dict(dy=torch.randn(N)), "dy "),
    "x has other M": (dict(x=torch.randn(M + 1, K)), "x "),
    "x is missing for dA": (dict(x=None, needs=("A",)), "x "),
    "x is missing for dp_d": (dict(x=None, needs=("p_d",)), "x "),
    "x is missing for dp_b": (dict(x=None, needs=("p_b",)), "x "),
    "u has other M": (dict(u=torch.randn(M - 1, R)), "u "),
    "u has other R": (dict(u=torch.randn(M, R + 1)), "u "),
    "h is missing": (dict(h=None), "h "),
    "h has other N": (dict(h=torch.randn(M, N - 1)), "h "),
    "no seed": (dict(dropout_p=0.5), "seed"),
    "d has other R": (dict(d=torch.ones(R + 1)), "rank_scale"),
    "g_d has size K": (dict(g_d=torch.ones(K)), "delta_out_scale"),
    "weight has other K": (dict(weight=torch.randn(N, K - 1)), "weight"),
    "weight has other N": (dict(weight=torch.randn(N + 1, K), needs=("p_b",)), "weight"),
    "lora_A is 1-D": (dict(lora_A=torch.randn(R)), "lora_A"),
    "lora_B has other R": (dict(lora_B=torch.randn(N, R + 1)), "lora_B"),
}


@pytest.mark.parametrize("case", BACKWARD_CASES)
def test_the_backward_op_checks_before_any_kernel(case):
    change, words = BACKWARD_CASES[case]
    with pytest.raises((ValueError, TypeError), match=words):
        ops.lora_linear_bwd(*backward(**FULL | change))


def test_the_backward_op_asks_for_what_is_read_alone():
    ops.lora_linear_bwd(*backward(**FULL))
    ops.lora_linear_bwd(
        *backward(**FULL | dict(x=None, h=None, weight=torch.randn(1, 1), needs=("B", "bias", "d", "g_d")))
    )


def test_ops_take_a_vector_a_place_and_a_kind_that_there_is():
    c = forward(*good().values())
    with pytest.raises(ValueError, match="scales has 4 entries, expected 5"):
        ops.lora_linear_fwd(*c._replace(scales=[None] * 4))
    with pytest.raises(ValueError, match="scales has 6 entries, expected 5"):
        ops.lora_linear_bwd(*backward(**FULL)._replace(scales=[None] * 6))
    with pytest.raises(ValueError, match="kind is 'dens', expected one of dense, identity"):
        ops.lora_linear_fwd(*c._replace(kind="dens"))


LAYER_CASES = [
    (dict(r=0), ValueError, "r "),
    (dict(r=-1), ValueError, "r "),
    (dict(r=2.0), TypeError, "r "),
    (dict(r=True), TypeError, "r "),
    (dict(lora_alpha="16"), TypeError, "lora_alpha"),
    (dict(lora_dropout=1.0), ValueError, "lora_dropout"),
    (dict(lora_dropout=-0.5), ValueError, "lora_dropout"),
    (dict(lora_dtype=torch.float16), TypeError, "lora_dtype"),
]


@pytest.mark.parametrize("options, error, words", LAYER_CASES)
def test_layer(options, error, words):
    with pytest.raises(error, match=words):
        LoRALinear(4, 5, **options)
    with pytest.raises(TypeError, match="linear"):
        LoRALinear.from_linear(torch.nn.ReLU())


BEYOND = {
    "multi_lora_linear": lambda x, W, A, B, s: multi_lora_linear(x, W, [(A, B, s)], torch.zeros(M, dtype=torch.int64)),
    "AdapterBank": lambda x, W, A, B, s: AdapterBank(K, N, max_adapters=1, max_rank=R).add("a", A, B, s),
    "bottleneck_adapter": lambda x, W, A, B, s: bottleneck_adapter(x, A, A.t(), scaling=s),
    "BottleneckAdapter": lambda x, W, A, B, s: BottleneckAdapter(K, R, scaling=s),
    "row_norm": lambda x, W, A, B, s: row_norm(W, A, B, s),
    "loha_linear": lambda x, W, A, B, s: loha_linear(x, W, B, A, B, A, scaling=s),
    "shira_linear": lambda x, W, A, B, s: shira_linear(x, W, *_listed(), scaling=s),
    "fourierft_linear": lambda x, W, A, B, s: fourierft_linear(x, W, *_listed(), scaling=s),
    "waveft_linear": lambda x, W, A, B, s: waveft_linear(x, W, *_listed(), scaling=s),
}


def _listed():
    return torch.randn(3), torch.tensor([[0, 1, 2], [3, 4, 5]])


@pytest.mark.parametrize("name", BEYOND)
def test_a_number_beyond_floats_is_named(name):
    for bad, error in ((10**400, ValueError), ("2", (TypeError, ValueError))):
        with pytest.raises(error, match="scaling"):
            BEYOND[name](*good().values(), bad)
