"""Models with experts: training steps have PEFT's losses, nothing of a parameter's size is made, experts that are modules."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import peftkern

SMALL = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
MODELS = {
    "Mixtral": {"num_local_experts": 4, "intermediate_size": 24},
    "Qwen3Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "head_dim": 8},
    "GptOss": {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 12, "head_dim": 8},
}  # fmt: skip


def _model(zoo, kind):
    torch.manual_seed(0)
    config = getattr(zoo.transformers, f"{kind}Config")(**SMALL, **MODELS[kind])
    settings = zoo.peft.LoraConfig(
        r=4, target_modules=["q_proj"], target_parameters=["experts.gate_up_proj", "experts.down_proj"]
    )
    return zoo.peft.get_peft_model(getattr(zoo.transformers, f"{kind}ForCausalLM")(config), settings)


def _train(model, steps=6):
    optimizer, losses = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2), []
    ids = torch.randint(40, (2, 9), generator=torch.Generator().manual_seed(1))
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)


@pytest.mark.parametrize("kind", MODELS)
def test_training(zoo, kind):
    stock = _model(zoo, kind)
    ours = copy.deepcopy(stock)
    assert not peftkern.accelerate(ours).skipped
    losses, wanted = _train(ours), _train(stock)
    torch.testing.assert_close(losses, wanted, rtol=1e-4, atol=1e-4)
    assert wanted[-1] < wanted[0] - 0.1
    status = peftkern.status(ours)
    assert (status.fused, status.stock) == (6 * 4, 0)
    ids = torch.ones(1, 3, dtype=torch.long)
    got, wanted = (m.eval().generate(input_ids=ids, max_new_tokens=5, do_sample=False) for m in (ours, stock))
    assert torch.equal(got, wanted) and peftkern.status(ours).stock == 0


class _Largest(TorchDispatchMode):
    """The most elements that a tensor of its own has which an op gives."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        known = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in known:
                self.elements = max(self.elements, t.numel())
        return out


def test_nothing_of_a_parameters_size(moe):
    stock = moe.both()
    ours, given, grad = copy.deepcopy(stock), moe.call(3), torch.randn(3, moe.columns)
    peftkern.accelerate(ours)
    found = {}
    for name, model in (("ours", ours), ("stock", stock)):
        with _Largest() as largest:
            moe.step(model, *given, grad)
        found[name] = largest.elements
    whole = stock.base_model.model.experts.get_base_layer().gate_up_proj.numel()
    adapters = max(p.numel() for name, p in stock.named_parameters() if "lora_" in name)
    assert found["stock"] >= whole > 2 * found["ours"] and found["ours"] <= adapters


class Experts(nn.Module):
    """Experts that are modules, as models of transformers 4 have them."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8)) for _ in range(3))

    def forward(self, x, index):
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            rows = (index == e).nonzero()[:, 0]
            y = y.index_add(0, rows, expert(x[rows]))
        return y


def test_experts_that_are_modules(zoo):
    config = zoo.peft.LoraConfig(r=2, target_modules=r".*\.[012]\.[02]", init_lora_weights=False)
    stock = zoo.peft.get_peft_model(Experts().double(), config)
    ours = copy.deepcopy(stock)
    report = peftkern.accelerate(ours)
    assert len(report.accelerated) == 6 and not report.skipped
    x, index = torch.randn(7, 8, dtype=torch.float64), torch.tensor([0, 1, 0, 1, 1, 0, 0])  # none for the last
    for model in (ours, stock):
        model(x, index).square().sum().backward()
    torch.testing.assert_close(zoo.gradients(ours), zoo.gradients(stock))
    assert peftkern.status(ours).stock == 0
