"""Tests against AdapterHub's ``adapters``, which needs another release of transformers than this project's environment has.

They are collected in ``.venv-adapters`` alone (``make adapters-env``): tests/integrations/test_environments.py runs them there.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from types import ModuleType

import pytest
import torch
from torch import nn

collect_ignore_glob = [] if importlib.util.find_spec("adapters") else ["test_*.py"]


@pytest.fixture
def shared_mask(monkeypatch):
    """What torch's dropout keeps is what peftkern keeps for this seed."""
    from peftkern import dropout_mask

    def dropout(x, p=0.5, training=True, inplace=False):
        keep = dropout_mask(x.shape[:-1].numel(), x.shape[-1], p, 7).view(x.shape)
        return torch.where(keep, x / (1 - p), 0.0) if training and p else x

    monkeypatch.setattr(nn.functional, "dropout", dropout)
    return 7


@pytest.fixture(scope="session")
def interventions():
    """``pyreft.interventions``. Its package imports ``datasets``, for what no test needs."""
    if importlib.util.find_spec("datasets") is not None:
        return importlib.import_module("pyreft.interventions")
    stub = ModuleType("datasets")
    stub.__spec__ = importlib.machinery.ModuleSpec("datasets", None)
    stub.Dataset, stub.load_dataset = object, None
    sys.modules["datasets"] = stub
    try:
        return importlib.import_module("pyreft.interventions")
    finally:
        del sys.modules["datasets"]
