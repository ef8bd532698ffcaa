"""route: what is known of a tensor of ids holds for what it holds, and for one leading shape of x."""

import pytest
import torch

from peftkern import AdapterBank, multi_lora_linear, sgmv


def test_ids_first_used_in_inference_mode_serve_training():
    bank = AdapterBank(6, 5, max_adapters=2, max_rank=3)
    for name in "ab":
        bank.add(name, torch.randn(3, 6), torch.randn(5, 3))
    W, ids = torch.randn(5, 6), torch.tensor([0, 1, -1, 0])
    x = torch.randn(4, 6, requires_grad=True)
    with torch.inference_mode():
        expected = multi_lora_linear(x, W, bank, ids)
    y = multi_lora_linear(x, W, bank, ids)
    y.sum().backward()
    torch.testing.assert_close(y, expected)
    assert x.grad is not None and x.grad.ne(0).any()


BEFORE, AFTER = [0, 1, 2, -1], [2, 0, -1, 1]


def _adapters():
    return [(torch.randn(3, 6), torch.randn(5, 3), 1.0 + i) for i in range(3)]


def _rows(x, W, adapters, ids):
    """Each row by its own adapter, in fp64."""
    y = x.double() @ W.double().t()
    for t, i in enumerate(ids):
        if i >= 0:
            A, B, s = adapters[i]
            y[t] += s * (x[t].double() @ A.double().t() @ B.double().t())
    return y.float()


def _by_numpy(ids):
    ids.numpy()[:] = AFTER


def _by_data(ids):
    ids.data.copy_(torch.tensor(AFTER))


def _by_other_data(ids):
    ids.data = torch.tensor(AFTER)


def _by_storage(ids):
    ids.untyped_storage().copy_(torch.tensor(AFTER).untyped_storage())


@pytest.mark.parametrize("change", [_by_numpy, _by_data, _by_other_data, _by_storage])
@pytest.mark.parametrize("many", ["list", "bank"])
def test_ids_that_change_without_a_new_version_are_seen(many, change):
    x, W, adapters, ids = torch.randn(4, 6), torch.randn(5, 6), _adapters(), torch.tensor(BEFORE)
    given = adapters
    if many == "bank":
        given = AdapterBank(6, 5, max_adapters=3, max_rank=3)
        for name, adapter in zip("abc", adapters):
            given.add(name, *adapter)
    torch.testing.assert_close(multi_lora_linear(x, W, given, ids), _rows(x, W, adapters, BEFORE))
    version = ids._version
    change(ids)
    assert ids._version == version and ids.tolist() == AFTER
    torch.testing.assert_close(multi_lora_linear(x, W, given, ids), _rows(x, W, adapters, AFTER))
    torch.testing.assert_close(sgmv(x, given, ids), _rows(x, torch.zeros(5, 6), adapters, AFTER))


def test_an_id_that_no_adapter_has_is_refused_however_it_was_written():
    x, W, adapters, ids = torch.randn(4, 6), torch.randn(5, 6), _adapters(), torch.tensor(BEFORE)
    multi_lora_linear(x, W, adapters, ids)
    ids.numpy()[1] = 77
    with pytest.raises(ValueError, match="77"):
        multi_lora_linear(x, W, adapters, ids)


def test_known_ids_must_fit_the_leading_shape_of_every_x():
    W, adapters, ids = torch.randn(5, 6), _adapters(), torch.tensor([0, -1])
    multi_lora_linear(torch.randn(2, 3, 6), W, adapters, ids)
    for shape in (6, 6), (3, 2, 6):
        with pytest.raises(ValueError, match="one id per row"):
            multi_lora_linear(torch.randn(shape), W, adapters, ids)
    x, each = torch.randn(2, 3, 6), torch.tensor([[0, 1, 2], [-1, 0, 1]])
    expected = multi_lora_linear(x, W, adapters, each.flatten())
    assert torch.equal(multi_lora_linear(x, W, adapters, each), expected)
    with pytest.raises(ValueError, match="one id per row"):
        multi_lora_linear(x, W, adapters, each.t())
