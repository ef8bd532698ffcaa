"""LoRA by its initialisations and optimisers: an accelerated model trains as the library's own."""

from __future__ import annotations

import copy
import dataclasses
import sys
import typing

import pytest
import torch

import peftkern

peft = pytest.importorskip("peft", reason="HF PEFT is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

import small_models as small  # noqa: E402  (it imports transformers)
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer, create_riemannian_optimizer  # noqa: E402
from peft.tuners.lora.config import CordaConfig, LoraGAConfig  # noqa: E402
from peft.tuners.lora.loraga import preprocess_loraga  # noqa: E402

KIND, ADAPTER = "llama", {"r": 2, "lora_alpha": 4, "task_type": "CAUSAL_LM"}


def _lora(init, prepare=None, after=None, **options):
    # prepare: (base, config, a training step), before the adapters are made; after: (model).
    def build():
        base, targets = small.base(KIND)
        config = peft.LoraConfig(init_lora_weights=init, target_modules=targets, **ADAPTER, **options)
        if prepare is not None:
            rows = [{k: v[:1] for k, v in small.batch(KIND, i).items()} for i in range(4)]
            prepare(base, config, lambda: sum(base(**row).loss for row in rows))
        torch.manual_seed(1)
        model = peft.get_peft_model(base, config)
        if after is not None:
            after(model)
        return model

    return build


def _eva(model):
    # Few tokens say little: components that explain enough by one batch.
    batches = [{k: v for k, v in small.batch(KIND, i).items() if k != "labels"} for i in range(8)]
    peft.initialize_lora_eva_weights(model, batches, show_progress_bar=False)


def _corda(base, config, step):
    with pytest.MonkeyPatch.context() as patch:
        # The library takes a decorator from the package attrs, which it does not depend on; Python's own does here.
        patch.setitem(sys.modules, "attr", dataclasses)
        from peft.tuners.lora.corda import preprocess_corda

    preprocess_corda(base, config, step)


@torch.no_grad()
def _loftq(model):
    # The library's own wants scipy, bitsandbytes and a GPU. This leaves what that leaves: a weight of few values, and the largest
    # singular values of what is missing from it.
    for layer in model.modules():
        if isinstance(layer, peft.tuners.lora.layer.Linear):
            weight = layer.get_base_layer().weight
            step = weight.abs().max() / 8
            quantised = (weight / step).round() * step
            U, S, V = torch.linalg.svd(weight - quantised, full_matrices=False)
            root, r = S[: ADAPTER["r"]].sqrt(), ADAPTER["r"]
            layer.lora_A["default"].weight.data = root[:, None] * V[:r]
            layer.lora_B["default"].weight.data = U[:, :r] * root
            weight.data = quantised


INITIALISATIONS = {
    "default": _lora(True),
    "random": _lora(False),
    "rsLoRA": _lora(True, use_rslora=True),
    "gaussian": _lora("gaussian"),
    "pissa": _lora("pissa"),
    "pissa_niter_[number of iters]": _lora("pissa_niter_4"),
    "olora": _lora("olora"),
    "orthogonal": _lora("orthogonal"),
    "mica": _lora("mica"),
    "eva": _lora("eva", after=_eva, eva_config=peft.EvaConfig(rho=1.0)),
    "corda": _lora("corda", _corda, corda_config=CordaConfig(corda_method="kpm")),
    "lora_ga": _lora(
        "lora_ga", lambda base, config, step: preprocess_loraga(base, config, lambda: step().backward()),
        lora_ga_config=LoraGAConfig(),
    ),
    "loftq": _lora(True, after=_loftq),
}  # fmt: skip
OPTIMISERS = {
    "LoRA+": lambda model: create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=1e-2, loraplus_lr_ratio=4.0, eps=1e-4
    ),
    "LoRA-FA": lambda model: create_lorafa_optimizer(model, r=2, lora_alpha=4, lr=1e-2),
    "Riemannian LoRA": lambda model: create_riemannian_optimizer(model, torch.optim.AdamW, lr=1e-2, eps=1e-4),
}


def _trains_alike(stock, ours, optimiser=lambda model: None):
    report = peftkern.accelerate(ours)
    assert len(report.accelerated) == 3 and not report.skipped, report
    start = {name: p.clone() for name, p in ours.named_parameters()}
    expected = small.train(stock, KIND, optimiser(stock))
    assert small.train(ours, KIND, optimiser(ours)) == pytest.approx(expected, rel=1e-5)
    assert expected[-2] < 0.999 * expected[0], "of the same batch"
    status = peftkern.status(ours)
    assert (status.fused, status.stock) == (3 * small.STEPS, 0)
    return {name for name, p in ours.named_parameters() if not torch.equal(p, start[name])}


def test_every_initialisation_is_here():
    field = peft.LoraConfig.__dataclass_fields__["init_lora_weights"].type
    hints = typing.get_type_hints(peft.LoraConfig) if isinstance(field, str) else {"init_lora_weights": field}
    names = [n for part in typing.get_args(hints["init_lora_weights"]) for n in typing.get_args(part)]
    assert {"pissa", "eva"} <= set(names) <= INITIALISATIONS.keys()


@pytest.mark.parametrize("name", INITIALISATIONS)
def test_initialisation(name):
    stock = INITIALISATIONS[name]()
    if name not in ("default", "rsLoRA"):
        same = [torch.equal(p, q) for p, q in zip(stock.parameters(), _lora(True)().parameters(), strict=True)]
        assert not all(same), "it did nothing"
    changed = _trains_alike(stock, copy.deepcopy(stock))
    assert changed == {n for n, p in stock.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", OPTIMISERS)
def test_optimiser(name):
    stock = _lora("gaussian")()
    changed = _trains_alike(stock, copy.deepcopy(stock), OPTIMISERS[name])
    assert {n.split(".")[-3] for n in changed} == ({"lora_B"} if name == "LoRA-FA" else {"lora_A", "lora_B"})
