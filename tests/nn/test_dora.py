"""LoRALinear(use_dora=True): magnitudes, merging, checkpoints, training."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from peftkern import LoRALinear, dora_linear


def layer(dtype=torch.float64, **options):
    made = LoRALinear(10, 7, r=3, use_dora=True, dtype=dtype, **options)
    nn.init.normal_(made.lora_B)
    nn.init.uniform_(made.lora_magnitude, 0.5, 2.0)
    return made


def _total(made):
    return (made.weight.double() + made.scaling * made.lora_B.double() @ made.lora_A.double()).detach()


def adapted(made):
    """f * (W + s B A) in fp64."""
    total = _total(made)
    return total * (made.lora_magnitude.double() / total.norm(dim=1))[:, None].detach()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_new_layer_equals_its_base(dtype):
    linear = nn.Linear(10, 6).to(dtype)
    made = LoRALinear.from_linear(linear, r=3, use_dora=True)
    x = torch.randn(4, 10, dtype=dtype)
    torch.testing.assert_close(made(x), linear(x))
    assert made.lora_magnitude.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(made.lora_magnitude.double(), linear.weight.double().norm(dim=1))
    assert [n for n, p in made.named_parameters() if p.requires_grad] == ["lora_A", "lora_B", "lora_magnitude"]
    assert made.state_dict().keys() == {"weight", "bias", "lora_A", "lora_B", "lora_magnitude"}
    assert made.use_dora and "use_dora=True" in repr(made)
    assert "lora_magnitude" not in LoRALinear(10, 6).state_dict() and LoRALinear(10, 6).lora_magnitude is None


def test_meta_then_reset():
    made = LoRALinear(10, 6, use_dora=True, device="meta").to_empty(device="cpu")
    nn.init.normal_(made.weight)
    made.reset_lora_parameters()
    torch.testing.assert_close(made.lora_magnitude.detach(), made.weight.norm(dim=1))


@pytest.mark.parametrize("use_rslora", [False, True])
def test_forward_is_dora_linear(use_rslora):
    made = layer(use_rslora=use_rslora, lora_dropout=0.5)
    x = torch.randn(2, 3, 10, dtype=torch.float64)
    args = (x, made.weight, made.lora_A, made.lora_B, made.lora_magnitude)
    torch.manual_seed(1)
    y = made(x)
    torch.manual_seed(1)
    assert torch.equal(y, dora_linear(*args, bias=made.bias, scaling=made.scaling, dropout_p=0.5, training=True))
    assert not torch.equal(y, made.eval()(x))
    torch.testing.assert_close(made(x), nn.functional.linear(x, adapted(made), made.bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("small", [False, True], ids=["any", "a zero"])
def test_merge_and_unmerge(dtype, small):
    made = layer(dtype).eval()
    if small:
        with torch.no_grad():
            made.lora_magnitude[2] = 0.0
    before, pointer = made.weight.detach().clone(), made.weight.data_ptr()
    total, expected, state = _total(made), adapted(made).to(dtype), copy.deepcopy(made.state_dict())

    def one_rounding(weight):  # of the merged row
        bound = 4 * torch.finfo(dtype).eps * (total.abs() + before.abs()).double()
        assert weight.dtype == dtype and ((weight.double() - before.double()).abs() <= bound).all()
        assert not small or torch.equal(weight, before)

    made.merge()
    made.merge()
    assert made.merged and (made.weight.data_ptr() == pointer) != small
    torch.testing.assert_close(made.weight.detach(), expected)
    # What was merged is remembered, also by copies.
    with torch.no_grad():
        made.lora_magnitude.mul_(3.0)
        made.lora_B.add_(1.0)
    for each in (copy.deepcopy(made), pickle.loads(pickle.dumps(made)), made):
        one_rounding(each.state_dict()["weight"])
        each.unmerge()
        each.unmerge()
        one_rounding(each.weight.detach())
        assert not each.merged
    made.merge()
    made.load_state_dict(state)
    assert not made.merged and torch.equal(made.weight.detach(), before)


def test_merged_layer_keeps_its_magnitudes():
    made = layer()
    made.merge()
    with pytest.raises(RuntimeError, match="merged"):
        made.reset_lora_parameters()
    with pytest.raises(RuntimeError, match="merged"):
        made(torch.randn(2, 10, dtype=torch.float64))


@pytest.mark.parametrize("assign", [False, True])
def test_plain_checkpoint(assign):
    # Inside a model, where the keys have a prefix, and beside a layer whose checkpoint has magnitudes.
    model, linear = nn.ModuleList([layer(), layer()]), nn.Linear(10, 7, dtype=torch.float64)
    nn.init.zeros_(model[0].lora_B)
    other = layer()
    state = {f"0.{k}": v for k, v in linear.state_dict().items()} | {f"1.{k}": v for k, v in other.state_dict().items()}
    model[0].merge()
    result = model.load_state_dict(state, strict=False, assign=assign)
    assert set(result.missing_keys) == {"0.lora_A", "0.lora_B", "0.lora_magnitude"} and not result.unexpected_keys
    x = torch.randn(4, 10, dtype=torch.float64)
    torch.testing.assert_close(model[0](x), linear(x))
    assert torch.equal(model[1].lora_magnitude, other.lora_magnitude)
    # What has no weight says nothing of the magnitudes.
    start = other.lora_magnitude.detach().clone()
    other.load_state_dict({"lora_B": torch.ones(7, 3)}, strict=False)
    assert torch.equal(other.lora_magnitude, start)


def test_a_weight_that_is_not_whole_is_refused():
    made = layer()
    made.weight = nn.Parameter(torch.randn(70, dtype=torch.float64), requires_grad=False)
    with pytest.raises(RuntimeError, match=r"lora_magnitude: the weight has shape \(70,\)"):
        made.reset_lora_parameters()


def test_trains():
    made = layer(torch.float32, lora_dropout=0.1)
    optimizer = torch.optim.SGD([p for p in made.parameters() if p.requires_grad], lr=0.05)
    x, target = torch.randn(32, 10), torch.randn(32, 7)
    start, losses = made.lora_magnitude.detach().clone(), []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (made(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0] and not torch.equal(made.lora_magnitude, start)
