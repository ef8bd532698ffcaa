"""Small models trained with every method of the op lora_linear: the library's losses, and checkpoints that the library
loads. aLoRA has its tests in tests/integrations/hf_peft."""

from __future__ import annotations

import warnings

import pytest
import torch

import peftkern
from peftkern.methods import METHODS

peft = pytest.importorskip("peft", reason="HF PEFT is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

VOCABULARY, STEPS = 32, 20


def _llama():
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=16, attention_bias=True, initializer_range=0.2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config), ["q_proj", "k_proj", "down_proj"]


def _bert():
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=3,
        initializer_range=0.2,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config), ["query", "value", "output.dense"]


def _gpt2():
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=16, n_inner=24, n_layer=1, n_head=2, n_positions=16,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, initializer_range=0.2,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config), ["c_attn", "c_proj", "c_fc"]


MODELS = {"llama": _llama, "bert": _bert, "gpt2": _gpt2}


def _lora(**more):
    return lambda **options: peft.LoraConfig(r=3, lora_alpha=6, lora_dropout=0.0, **more, **options)


def _ia3(target_modules, **options):
    return peft.IA3Config(target_modules=target_modules, feedforward_modules=target_modules[-1:], **options)


def _osf(target_modules, fan_in_fan_out=False, **options):
    return peft.OSFConfig(target_modules=target_modules, effective_rank=3, **options)


def _kasa(**options):
    return _lora(kasa_config=peft.KasaConfig())(**options)


def _adalora(**options):
    return peft.AdaLoraConfig(init_r=4, target_r=2, tinit=2, tfinal=4, total_step=STEPS, lora_dropout=0.0, **options)


def _plain(cls, **more):
    # Of a class that does not know Conv1D, or sees for itself.
    return lambda fan_in_fan_out=False, **options: cls(**more, **options)


CONFIGS = {
    "LoRA": _lora(),
    "DoRA": _lora(use_dora=True),
    "KaSA": _kasa,
    "MiCA": _lora(init_lora_weights="mica"),
    "VeRA": lambda **options: peft.VeraConfig(r=8, d_initial=0.5, **options),
    "AdaLoRA": _adalora,
    "DeLoRA": _plain(peft.DeloraConfig, r=3, delora_lambda=4),
    "(IA)^3": _ia3,
    "BEFT": _plain(peft.BeftConfig),
    "TinyLoRA": lambda **options: peft.TinyLoraConfig(r=2, u=5, **options),
    "OSF": _osf,
    "MiSS": _plain(peft.MissConfig, r=4),
    "Uni-LoRA": lambda **options: peft.UniLoraConfig(r=3, theta_d_length=64, **options),
}
# Methods whose PEFT layers take no Conv1D.
LINEAR_ONLY = {"DeLoRA", "BEFT", "OSF", "MiSS", "KaSA"}
PAIRS = [(name, kind) for name in CONFIGS for kind in MODELS if kind != "gpt2" or name not in LINEAR_ONLY]


def _build(name, kind):
    torch.manual_seed(0)
    base, targets = MODELS[kind]()
    options = {"target_modules": targets, "task_type": "SEQ_CLS" if kind == "bert" else "CAUSAL_LM"}
    if kind == "gpt2":
        options["fan_in_fan_out"] = True
    return peft.get_peft_model(base, CONFIGS[name](**options))


def _batch(kind, seed):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCABULARY, (3, 6), generator=g)
    labels = torch.randint(0, 3, (3,), generator=g) if kind == "bert" else ids
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def _train(model, kind):
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser, losses = torch.optim.AdamW(trained, lr=1e-2, eps=1e-4), []
    for step in range(STEPS):
        loss = model.train()(**_batch(kind, step % 2)).loss
        loss.backward()
        optimiser.step()
        if hasattr(model.base_model, "update_and_allocate"):
            model.base_model.update_and_allocate(step)
        optimiser.zero_grad()
        losses.append(loss.item())
    return losses


def test_every_method_that_trains_is_here():
    here = {name for name, m in METHODS.items() if m.op == "lora_linear" and m.layer is not None and m.trains}
    assert CONFIGS.keys() == here - {"Arrow"}  # routes among trained adapters: test_arrow.py


@pytest.mark.parametrize("name, kind", PAIRS)
def test_trains_as_the_library_does(name, kind, tmp_path):
    stock, ours = _build(name, kind), _build(name, kind)
    report = peftkern.accelerate(ours)
    layers = [n for n, m in ours.named_modules() if isinstance(m, peft.tuners.tuners_utils.BaseTunerLayer)]
    assert report.accelerated == layers and len(layers) >= 3 and not report.skipped, report
    expected = _train(stock, kind)
    assert _train(ours, kind) == pytest.approx(expected, rel=1e-5)
    assert expected[-2] < 0.999 * expected[0], "of the same batch"
    status = peftkern.status(ours)
    assert (status.fused, status.stock) == (STEPS * len(layers), 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the library, on saving by its own rules
        ours.save_pretrained(tmp_path)
        torch.manual_seed(0)
        loaded = peft.PeftModel.from_pretrained(MODELS[kind]()[0], tmp_path)
    inputs = _batch(kind, 5)
    del inputs["labels"]
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(**inputs).logits, loaded.eval()(**inputs).logits)
