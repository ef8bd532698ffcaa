"""LoRALinear: a drop-in for nn.Linear."""

import copy
import pickle

import pytest
import torch
from torch import nn

from peftkern import LoRALinear, lora_linear, quantize


def trained(*args, **options):
    layer = LoRALinear(*args, **options)
    nn.init.normal_(layer.lora_B)
    return layer


def test_new_layer_equals_its_base():
    torch.manual_seed(0)
    linear = nn.Linear(10, 6)
    layer = LoRALinear.from_linear(linear, r=3)
    x = torch.randn(4, 10)
    torch.testing.assert_close(layer(x), linear(x))
    assert layer.weight is linear.weight and layer.bias is linear.bias
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == ["lora_A", "lora_B"]
    assert layer.lora_A.shape == (3, 10) and layer.lora_B.shape == (6, 3) and not layer.lora_B.any()


@pytest.mark.parametrize("use_rslora, scaling", [(False, 4.0), (True, 8.0)])
def test_forward_is_lora_linear(use_rslora, scaling):
    layer = trained(10, 6, r=4, lora_alpha=16, use_rslora=use_rslora, lora_dropout=0.5)
    x = torch.randn(2, 3, 10)
    assert layer.scaling == scaling
    torch.manual_seed(1)
    y = layer(x)
    torch.manual_seed(1)
    args = (x, layer.weight, layer.lora_A, layer.lora_B)
    assert torch.equal(y, lora_linear(*args, bias=layer.bias, scaling=scaling, dropout_p=0.5, training=True))
    layer.eval()
    assert torch.equal(layer(x), lora_linear(*args, bias=layer.bias, scaling=scaling))


def test_dtypes_and_options():
    layer = LoRALinear(10, 6, bias=False, dtype=torch.bfloat16)
    assert layer.bias is None and layer.lora_A.dtype == torch.float32
    assert LoRALinear(10, 6, dtype=torch.bfloat16, lora_dtype=torch.bfloat16).lora_B.dtype == torch.bfloat16
    assert LoRALinear(10, 6, train_bias=True).bias.requires_grad
    assert LoRALinear(10, 6, dtype=torch.float64)(torch.randn(2, 10).double()).dtype == torch.float64
    assert "r=8" in repr(layer) and LoRALinear(10, 6, device="meta").weight.is_meta


def test_plain_linear_checkpoint_loads():
    linear, layer = nn.Linear(10, 6), trained(10, 6)
    result = layer.load_state_dict(linear.state_dict(), strict=False)
    assert set(result.missing_keys) == {"lora_A", "lora_B"} and not result.unexpected_keys
    assert torch.equal(layer.weight, linear.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_merge_and_unmerge(dtype):
    layer = trained(10, 6, r=3, dtype=dtype).eval()
    x, before = torch.randn(4, 10, dtype=dtype), layer.weight.clone()
    y, pointer = layer(x), layer.weight.data_ptr()
    layer.merge()
    layer.merge()
    assert layer.merged and layer.weight.data_ptr() == pointer
    torch.testing.assert_close(layer(x), y)
    torch.testing.assert_close(layer.state_dict()["weight"], before)
    layer.unmerge()
    layer.unmerge()
    assert not layer.merged
    torch.testing.assert_close(layer.weight, before)


def test_merged_layer_refuses_training_and_loads_unmerged():
    layer = trained(10, 6)
    state = copy.deepcopy(layer.state_dict())
    layer.merge()
    with pytest.raises(RuntimeError, match="merged"):
        layer(torch.randn(2, 10))
    with pytest.raises(RuntimeError, match="merged"):
        layer.reset_lora_parameters()
    layer.load_state_dict(state)
    assert not layer.merged and torch.equal(layer.weight, state["weight"])


def test_copy_pickle_and_train():
    layer = trained(10, 6, lora_dropout=0.1)
    for clone in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        clone.eval(), layer.eval()
        x = torch.randn(2, 10)
        assert torch.equal(clone(x), layer(x))
    layer.train()
    optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=0.1)
    x, target = torch.randn(32, 10), torch.randn(32, 6)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (layer(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"use_dora": True, "dtype": torch.bfloat16}], ids=str)
def test_reset_parameters_makes_a_new_layer(options):
    torch.manual_seed(4)
    new = LoRALinear(10, 6, r=3, **options)
    layer = LoRALinear(10, 6, r=3, device="meta", **options).to_empty(device="cpu")
    for parameter in layer.parameters():
        nn.init.constant_(parameter, 9.0)
    torch.manual_seed(4)
    layer.reset_parameters()
    for (name, ours), theirs in zip(layer.named_parameters(), new.parameters(), strict=True):
        assert torch.equal(ours, theirs) and ours.requires_grad == theirs.requires_grad, name
    layer.eval().merge()
    with pytest.raises(RuntimeError, match="reset_parameters: the layer is merged"):
        layer.reset_parameters()


def test_reset_parameters_leaves_codes():
    layer = LoRALinear.from_linear(quantize(torch.randn(6, 64), "nf4"), use_dora=True)
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    nn.init.ones_(layer.lora_B), nn.init.zeros_(layer.lora_magnitude)
    layer.reset_parameters()
    after = layer.state_dict()
    assert all(torch.equal(after[k], before[k]) for k in before if k != "lora_A")
    assert not torch.equal(after["lora_A"], before["lora_A"])
