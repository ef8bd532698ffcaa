"""AdapterBank and Adapter: pickles, copies, and what torch.save writes of them."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
from banks import K, N, adapter, bank_of

from peftkern import Adapter, multi_lora_linear


def _saved(bank):
    file = io.BytesIO()
    torch.save(bank, file)
    return file


def _copied(made):
    return torch.load(io.BytesIO(_saved(made).getvalue()), weights_only=False)


@pytest.mark.parametrize("how", [lambda b: pickle.loads(pickle.dumps(b)), _copied, copy.copy, copy.deepcopy])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_pickle_or_copy_has_the_same_ids_and_memory_of_its_own(how, dtype):
    bank, listed = bank_of(3, 1, 5, dtype=dtype, max_adapters=6)
    shared = listed[0][:2]
    bank.add("shared", *shared, -0.25, rank_scale=torch.rand(3), delta_out_scale=torch.rand(N))
    bank.remove("a1")
    bank.add("all", *adapter(2, 7), 1.5, bias=torch.rand(N), rank_bias=torch.rand(2), activation="gelu",
             base_in_scale=torch.rand(K), delta_in_scale=torch.rand(K), base_out_scale=torch.rand(N))  # fmt: skip
    bank.add("vectors", base_out_scale=torch.rand(N))
    names = ["shared", "all", None, "a0", "vectors", "a2"]
    ids, W, x = bank.ids(names), torch.randn(N, K, dtype=dtype), torch.randn(6, K, dtype=dtype)
    expected = multi_lora_linear(x, W, bank, ids)
    twin = how(bank)
    assert twin.names == bank.names and torch.equal(twin.ids(names), ids) and twin.dtype == dtype
    assert torch.equal(multi_lora_linear(x, W, twin, ids), expected)
    assert len(twin.pairs) == len(bank.pairs) == 3, "matrices that were shared still are"
    twin.replace("a0", *adapter(8, 1), 2.0)
    twin.remove("all")
    assert torch.equal(multi_lora_linear(x, W, bank, ids), expected), "the first does not notice"
    with pytest.raises(ValueError, match="id"):
        multi_lora_linear(x, W, twin, ids)
    assert twin.add("next", *adapter(1, 1)) % 8 == ids[1] % 8, "the slot is used again"
    with pytest.raises(ValueError, match="id"):
        multi_lora_linear(x, W, twin, ids)


def test_a_pickle_loads_in_another_process_and_holds_no_free_memory():
    bank, listed = bank_of(3, 8, max_adapters=4)
    whole = len(_saved(bank).getvalue())
    bank.remove("a1")
    x, W = torch.randn(2, K), torch.randn(N, K)
    assert len(_saved(bank).getvalue()) <= whole - 8 * (K + N) * 4
    code = (
        "import io, sys, torch; from peftkern import multi_lora_linear\n"
        "bank, x, W = torch.load(io.BytesIO(sys.stdin.buffer.read()), weights_only=False)\n"
        "torch.save(multi_lora_linear(x, W, bank, bank.ids(['a0', None])), sys.stdout.buffer)"
    )
    run = subprocess.run([sys.executable, "-c", code], input=_saved((bank, x, W)).getvalue(), stdout=-1, check=True)
    y = torch.load(io.BytesIO(run.stdout))
    torch.testing.assert_close(y, multi_lora_linear(x, W, [listed[0]], torch.tensor([0, -1])))


@pytest.mark.parametrize("how", [lambda a: pickle.loads(pickle.dumps(a)), copy.copy, copy.deepcopy])
def test_an_adapter_has_pickles_and_copies(how):
    A, B = adapter(2, 7)
    given = Adapter(A, B, 1.5, bias=torch.rand(N), rank_bias=torch.rand(2), activation="gelu", rank_scale=torch.rand(2))
    made, x, W, ids = how(given), torch.randn(3, K), torch.randn(N, K), torch.tensor([0, -1, 0])
    assert torch.equal(multi_lora_linear(x, W, [made], ids), multi_lora_linear(x, W, [given], ids))
    assert made.beside() == given.beside() == ["bias"]
    assert (
        (made.lora_A is A)
        == (how is copy.copy)
        == (made.coefficients["rank_scale"] is given.coefficients["rank_scale"])
    )
