"""route: ids first met where nothing is recorded serve training next."""

import torch

from peftkern import AdapterBank, multi_lora_linear


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
