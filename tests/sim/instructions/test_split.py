"""Wide values as bf16 terms: each term is the rounding of what is left, and enough of them lose nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch


def as_floats(words: np.ndarray) -> torch.Tensor:
    """bf16 values of words (pairs, terms), as (pairs, 2, terms) in fp64."""
    halves = np.ascontiguousarray(words).view(np.int16).reshape(*words.shape, 2)
    return torch.from_numpy(halves.copy()).view(torch.bfloat16).double().transpose(1, 2)


@pytest.mark.parametrize("terms", [1, 2, 3])
def test_split(sim, terms):
    rng = np.random.default_rng(terms)
    values = (rng.standard_normal(2000) * 2.0 ** rng.integers(-60, 60, 2000)).astype(np.float32)
    values[:6] = 0, -0.0, 1, -1.0078125, 1 + 2.0**-23, 1e-30
    with sim.memory() as memory:
        out = memory.empty((1000, terms), np.uint32)
        sim.run("sim_split", terms, memory.put(values), 2000, out)
        got = as_floats(out.array)
    rest = torch.from_numpy(values.copy()).reshape(1000, 2)
    for i in range(terms):
        term = rest.bfloat16().float()
        assert torch.equal(got[..., i], term.double())
        rest = rest - term
    error = (got.sum(-1) - torch.from_numpy(values).double().reshape(1000, 2)).abs()
    assert (error <= 2.0 ** (-8 * terms) * torch.from_numpy(values).double().reshape(1000, 2).abs()).all()
    assert terms < 3 or not error.any()


def test_every_fp16_value_is_two_terms(sim):
    bits = np.arange(1 << 16, dtype=np.uint16)
    bits = bits[np.isfinite(bits.view(np.float16))]
    with sim.memory() as memory:
        out = memory.empty((len(bits) // 2, 2), np.uint32)
        sim.run("sim_split_f16", memory.put(bits.view(np.uint32)), len(bits) // 2, out)
        got = as_floats(out.array).sum(-1).reshape(-1)
    np.testing.assert_array_equal(got.numpy(), bits.view(np.float16).astype(np.float64))
