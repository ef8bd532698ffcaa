"""The CPU back end of lora_linear's ops: what the native calls do not take as it is comes out the same."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from peftkern.backends.cpu import call

pytestmark = pytest.mark.skipif(call.unavailable is not None, reason=f"no native calls: {call.unavailable}")

SIZES = dict(
    x=(6, 20),
    weight=(9, 20),
    lora_A=(3, 20),
    lora_B=(9, 3),
    bias=(9,),
    d=(3,),
    p_b=(20,),
    p_d=(20,),
    g_b=(9,),
    g_d=(9,),
)


class Marked(Tensor):
    pass


def negative(t: Tensor) -> Tensor:
    """The same values in memory that holds their negatives."""
    return torch._neg_view(-t)


OTHERS = {
    "marked": lambda t: t.as_subclass(Marked),
    "negative": negative,
    "part of a conjugate": lambda t: torch.complex(t, -t).conj().imag,
    "strided": lambda t: t.repeat_interleave(2, dim=-1)[..., ::2],
}


def passes(t: dict[str, Tensor], dy: Tensor) -> list[Tensor]:
    """Results of both passes, every gradient included."""
    ops, base = torch.ops.peftkern, [t["weight"]]
    scales, seed = [t[name] for name in ("d", "p_b", "p_d", "g_b", "g_d")], torch.tensor([3])
    numbers = 0.5, 0.25, seed
    y, u, h = ops.lora_linear_fwd(t["x"], base, "dense", t["lora_A"], t["lora_B"], t["bias"], *numbers, scales, True)
    *grads, vectors = ops.lora_linear_bwd(
        dy, t["x"], u, h, base, "dense", t["lora_A"], t["lora_B"], *numbers, scales, [True] * 9
    )
    return [r.as_subclass(Tensor) for r in (y, u, h, *grads, *vectors)]


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("name", [*SIZES, "dy"])
def test_tensors_that_native_calls_do_not_take(monkeypatch, name, other):
    monkeypatch.setenv("PEFTKERN_BACKEND", "cpu")
    t = {key: torch.rand(shape) + 0.5 for key, shape in SIZES.items()}
    dy = torch.randn(6, 9)
    want = passes(t, dy)
    if name == "dy":
        dy = OTHERS[other](dy)
    else:
        t[name] = OTHERS[other](t[name])
    for got, expected in zip(passes(t, dy), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
