"""What the tests of whole models with ``adapter_names`` share."""

from types import SimpleNamespace

import pytest
import torch


def loss(y, names, rows=slice(None)):
    """A fixed random sum over the logits of these rows of the batch with these names."""
    weights = torch.randn((len(names), *y.shape[1:]), generator=torch.Generator().manual_seed(17), dtype=torch.float64)
    return (y.double() * weights[rows]).sum()


@pytest.fixture
def apart(zoo):
    """``loss``, and ``gradients(model, inputs, names)`` by PEFT's own code: each adapter active by itself on its own rows."""

    def gradients(model, inputs, names):
        result = {}
        for adapter in dict.fromkeys(name for name in names if name != "__base__"):
            rows = [i for i, name in enumerate(names) if name == adapter]
            model.base_model.set_adapter([adapter])
            model.train().zero_grad()
            loss(model(inputs[rows]).logits, names, rows).backward()
            result |= zoo.gradients(model)
        return result

    return SimpleNamespace(loss=loss, gradients=gradients)
