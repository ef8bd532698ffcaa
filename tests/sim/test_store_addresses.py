"""Addresses that travel as an argument of the launch arrive, also where it takes more than one."""

from __future__ import annotations

import numpy as np
import pytest


@pytest.mark.parametrize("count", [0, 1, 31, 256, 257, 700])
@pytest.mark.parametrize("at_end", [True, False])
def test_addresses_arrive(sim, count, at_end):
    addresses = np.random.default_rng(count).integers(0, 2**63, count, np.uint64)
    with sim.memory(at_end=at_end) as memory:
        out = memory.empty(count, np.uint64)
        sim.run("sim_store_addresses", memory.put(addresses), count, out, seed=count)
        np.testing.assert_array_equal(out.array, addresses)
