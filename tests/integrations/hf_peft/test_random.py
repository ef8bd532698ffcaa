"""Random sequences of everything that changes a layer, done to a stock and an accelerated layer alike."""

import random
import warnings

import pytest
import torch

import peftkern
from peftkern.integrations import hf_peft

NAMES = ["default", "b", "c"]


class Twins:
    """A stock layer and an accelerated one; every method does the same to both."""

    def __init__(self, zoo, seed):
        self.zoo, self.random = zoo, random.Random(seed)
        self.models = [zoo.layer(lora_bias=True)[0] for _ in range(2)]
        self.handles = []
        peftkern.accelerate(self.models[1])

    @property
    def layers(self):
        return [m.base_model.model[0] for m in self.models]

    def present(self):
        return list(self.layers[0].lora_A)

    def add(self):
        name = self.random.choice(NAMES)
        if name in self.present():
            return
        r, bias = self.random.randint(1, 6), self.random.random() < 0.5
        seed = self.random.randrange(1000)
        for model in self.models:
            config = self.zoo.peft.LoraConfig(target_modules=["0"], r=r, lora_bias=bias, use_rslora=bias)
            model.add_adapter(name, config)
            self.zoo.randomise(model, seed)

    def delete(self):
        if len(self.present()) > 1 and not self.layers[0].merged:
            name = self.random.choice(self.present())
            for model in self.models:
                model.base_model.delete_adapter(name)

    def activate(self):
        least = int(self.random.random() < 0.8)
        chosen = self.random.sample(self.present(), self.random.randint(least, len(self.present())))
        for layer in self.layers:
            layer.set_adapter(chosen)

    def merge(self):
        for layer in self.layers:
            layer.merge()

    def unmerge(self):
        for layer in self.layers:
            if layer.merged:
                layer.unmerge()

    def toggle(self):
        enabled = self.random.random() < 0.8
        for layer in self.layers:
            layer.enable_adapters(enabled)

    def scale(self):
        factor = self.random.choice([0.5, 2.0, -1.0])
        if not self.layers[0].merged:
            for layer in self.layers:
                layer.scale_layer(factor)

    def hook(self):
        while self.handles:
            self.handles.pop().remove()
        if self.random.random() < 0.5:
            part = self.random.choice(["base_layer", "lora_A", "lora_B", ""])
            for layer in self.layers:
                module = getattr(layer, part) if part else layer
                module = module[self.present()[0]] if part.startswith("lora") else module
                self.handles.append(module.register_forward_hook(lambda m, a, y: 2.0 * y))

    def freeze(self):
        train = self.random.random() < 0.2
        for layer in self.layers:
            layer.base_layer.weight.requires_grad_(train)

    def narrow(self):
        dtype = self.random.choice([torch.float32, torch.float64])
        for model in self.models:
            model.to(dtype)

    def again(self):
        # Only ours: these change no result.
        self.random.choice([peftkern.accelerate] * 4 + [peftkern.restore])(self.models[1])

    def reload(self):
        self.models = [self.zoo.copy(m) for m in self.models]
        self.handles = []
        for layer in self.layers:
            for module in layer.modules():
                module._forward_hooks.clear()

    # What ends a state comes more often than what begins it, or nothing would run fused for long.
    STEPS = (
        add, delete, activate, merge, unmerge, unmerge, unmerge, toggle, scale, hook, freeze, narrow, again, reload,
    )  # fmt: skip

    def outcomes(self):
        """[(y, dx, gradients by name)] of the two."""
        x = torch.randn(4, 24, dtype=self.layers[0].base_layer.weight.dtype)
        results = []
        for layer in self.layers:
            leaf = x.clone().requires_grad_(True)
            layer.zero_grad()
            y = layer(leaf)
            y.square().sum().backward()
            results.append((y.detach(), leaf.grad, self.zoo.gradients(layer)))
        return results


@pytest.mark.parametrize("seed", range(5))
def test_random_sequences(zoo, fused, seed):
    twins = Twins(zoo, seed)
    for step in range(40):
        action = twins.random.choice(Twins.STEPS)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            action(twins)
        before = len(fused)
        stock, ours = twins.outcomes()
        message = f"step {step}: {action.__name__}, {hf_peft.why_not(twins.layers[1])}"
        assert stock[2].keys() == ours[2].keys(), message
        pairs = [(stock[0], ours[0]), (stock[1], ours[1]), *((stock[2][n], ours[2][n]) for n in stock[2])]
        for a, b in pairs:
            scale = a.abs().max().item() + 1e-3
            assert a.dtype == b.dtype and (a - b).abs().max().item() <= 2e-5 * scale, message
        assert len(fused) - before == (hf_peft.why_not(twins.layers[1]) is None), message
    assert 5 < len(fused) < 40
