"""What merge and unmerge do to the weight, to whoever shares it, and to a layer that changes in between."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

from peftkern import LoRALinear


def layer(**options):
    made = LoRALinear(10, 7, r=3, **options)
    nn.init.normal_(made.lora_B)
    return made.eval()


class Tied(nn.Module):
    """A language model's two ends on one weight."""

    def __init__(self, tie):
        super().__init__()
        self.embed, head = nn.Embedding(7, 10), nn.Linear(10, 7, bias=False)
        self.head = tie(self.embed, head)
        nn.init.normal_(self.head.lora_B)
        self.eval()


def before(embed, head):
    head.weight = embed.weight
    return LoRALinear.from_linear(head)


def after(embed, head):
    head = LoRALinear.from_linear(head)
    embed.weight = head.weight
    return head


def by_storage(embed, head):
    # As a state dict with shared tensors loads with assign=True.
    head.weight = nn.Parameter(embed.weight.data)
    return LoRALinear.from_linear(head)


@pytest.mark.parametrize("tie", [before, after, by_storage])
def test_a_tied_embedding_does_not_change(tie):
    model = Tied(tie)
    tied, start = model.head.weight is model.embed.weight, model.embed.weight.detach().clone()
    names, x = [n for n, _ in model.named_parameters(remove_duplicate=False)], torch.randn(2, 10)
    y = model.head(x)
    model.head.merge()
    assert torch.equal(model.embed.weight, start)
    torch.testing.assert_close(model.head(x), y)
    assert not torch.equal(model.head.weight, start)
    torch.testing.assert_close(model.state_dict()["head.weight"], start)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.deepcopy(model).double(), model):
        twin.head.unmerge()
        assert (twin.head.weight is twin.embed.weight) == tied
        torch.testing.assert_close(twin.head.weight.float(), start)
        assert [n for n, _ in twin.named_parameters(remove_duplicate=False)] == names


@pytest.mark.parametrize(
    "hold",
    [
        lambda made: made.state_dict(), lambda made: list(made.parameters()), lambda made: made.weight[2:],
        lambda made: torch.optim.AdamW(made.parameters()), lambda made: made.weight.numpy(),
        lambda made: made(torch.ones(2, 10, requires_grad=True)),
    ],
    ids=["state dict", "list", "view", "optimizer", "array", "graph"],
)  # fmt: skip
def test_whoever_holds_the_weight_keeps_it(hold):
    made = layer()
    start, pointer = made.weight.detach().clone(), made.weight.data_ptr()
    held = hold(made)
    made.merge()
    assert made.weight.data_ptr() != pointer
    if isinstance(held, torch.Tensor) and held.requires_grad:
        held.sum().backward()  # its weight is as it was
    made.unmerge()
    torch.testing.assert_close(made.weight, nn.Parameter(start, requires_grad=False))


@pytest.mark.parametrize("change", ["lora_A", "lora_B", "scaling", "data"])
@pytest.mark.parametrize("held", [False, True], ids=["alone", "held"])
def test_an_adapter_that_changes_while_merged(change, held):
    made = layer()
    start = made.weight.detach().clone()
    other = made.weight if held else None
    x = torch.randn(2, 10)
    y = made(x)
    made.merge()
    with torch.no_grad():
        if change == "scaling":
            made.scaling = 50.0
        elif change == "data":
            made.lora_B.data = torch.randn(7, 3) * 50
        else:
            getattr(made, change).mul_(50)
    torch.testing.assert_close(made(x), y, msg="what was merged stays in force")
    torch.testing.assert_close(made.state_dict()["weight"], start)
    resumed = layer()
    resumed.load_state_dict(made.state_dict())
    made.unmerge()
    assert other is None or made.weight is other
    torch.testing.assert_close(made.weight.detach(), start)
    resumed.scaling = made.scaling
    torch.testing.assert_close(made(x), resumed(x))
    assert not torch.allclose(made(x), y), "and the changed adapter acts"


def test_loading_while_merged_and_tied():
    model = Tied(before)
    state = {k: torch.randn_like(v) for k, v in model.state_dict().items()}
    state["head.weight"] = state["embed.weight"]
    model.head.merge()
    model.load_state_dict(state)
    assert not model.head.merged and model.head.weight is model.embed.weight
    assert torch.equal(model.embed.weight, state["embed.weight"])


def test_merged_inside_inference_mode_trains_later():
    made = layer()
    with torch.inference_mode():
        made.merge()
        made.unmerge()
    made.train()(torch.randn(2, 10, requires_grad=True)).sum().backward()
    assert made.lora_B.grad.any()


def test_a_weight_that_has_become_something_else():
    class Ignores(torch.Tensor):
        """A frozen quantised weight."""

    for value, words in (
        (nn.Parameter(torch.randn(7, 10).as_subclass(Ignores), False), "Ignores"),
        (nn.Parameter(torch.randn(7, 10).to(torch.float8_e5m2), False), "float8_e5m2"),
        (nn.Parameter(torch.randn(7, 10, device="meta"), False), "offloaded"),
        (nn.Parameter(torch.randn(35), False), r"has shape \(35,\)"),
    ):
        made = layer()
        made.weight = value
        with pytest.raises(RuntimeError, match=f"merge: the weight .*{words}"):
            made.merge()
        assert not made.merged and made.weight is value
        made = layer()
        made.merge()
        made.weight = value
        with pytest.raises(RuntimeError, match=f"unmerge: the weight .*{words}"):
            made.unmerge()


def test_a_part_of_a_larger_tensor_changes_with_a_warning():
    made, flat = layer(), torch.randn(200)
    made.weight = nn.Parameter(flat[30:100].view(7, 10), requires_grad=False)
    start = flat.clone()
    with pytest.warns(UserWarning, match="part of a larger tensor") as caught:
        made.merge()
    assert caught[0].filename == __file__
    assert not torch.equal(flat[30:100], start[30:100]) and torch.equal(flat[100:], start[100:])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made.unmerge()
    torch.testing.assert_close(flat, start)
