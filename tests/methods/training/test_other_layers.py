"""Small models whose convolutions and embeddings have adapters: the report takes them, and they train as the library's."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

import peftkern

peft = pytest.importorskip("peft", reason="HF PEFT is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

import small_models as small  # noqa: E402  (it imports transformers)


def _vit():
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, image_size=16, patch_size=4,
        num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.2,
    )  # fmt: skip
    model = transformers.ViTForImageClassification(config)
    return (
        model,
        r".*(projection|q_proj)",
        {"pixel_values": torch.randn(4, 3, 16, 16), "labels": torch.tensor([0, 1, 2, 1])},
    )


def _resnet():
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], layer_type="basic", num_labels=3, num_channels=3
    )
    model = transformers.ResNetForImageClassification(config)
    return model, r".*\.convolution", {"pixel_values": torch.randn(4, 3, 32, 32), "labels": torch.tensor([0, 1, 2, 1])}


def _whisper():
    config = transformers.WhisperConfig(
        vocab_size=small.VOCABULARY, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, num_mel_bins=8, max_source_positions=10,
        max_target_positions=12, init_std=0.2, dropout=0.0, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1,
    )  # fmt: skip
    model = transformers.WhisperForConditionalGeneration(config)
    labels = torch.randint(3, small.VOCABULARY, (2, 6))
    return model, r".*(conv1|conv2|embed_tokens|v_proj)", {"input_features": torch.randn(2, 8, 20), "labels": labels}


def _text(kind, embedding, linear):
    model, _ = small.base(kind)
    return model, f".*({embedding}|{linear})", small.batch(kind, 0)


MODELS = {
    "vit": _vit,
    "resnet": _resnet,
    "whisper": _whisper,
    "llama": lambda: _text("llama", "embed_tokens", "q_proj"),
    "gpt2": lambda: _text("gpt2", "wte", "c_attn"),
}


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("kind", MODELS)
def test_trains_as_the_library_does(kind, dora, tmp_path):
    torch.manual_seed(0)
    base, targets, inputs = MODELS[kind]()
    untouched = copy.deepcopy(base)
    config = peft.LoraConfig(target_modules=targets, r=4, use_dora=dora, fan_in_fan_out=kind == "gpt2")
    stock = peft.get_peft_model(base, config)
    ours = copy.deepcopy(stock)
    report = peftkern.accelerate(ours)
    layers = [name for name, m in ours.named_modules() if isinstance(m, peft.tuners.tuners_utils.BaseTunerLayer)]
    assert report.accelerated == layers and not report.skipped, report
    assert any(by.startswith("torch's") for by in report.backends.values())
    losses = []
    for model in (stock, ours):
        optimiser = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2, eps=1e-4)
        found = []
        for _ in range(8):
            loss = model.train()(**inputs).loss
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            found.append(loss.item())
        losses.append(found)
    assert losses[1] == pytest.approx(losses[0], rel=1e-4) and losses[0][-1] < 0.999 * losses[0][0]
    status = peftkern.status(ours)
    assert status.stock == 0 and status.fused >= 8 * len(layers)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the library, on saving an embedding that is tied
        ours.save_pretrained(tmp_path)
        loaded = peft.PeftModel.from_pretrained(untouched, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(ours(**inputs).logits, loaded.train()(**inputs).logits, rtol=1e-4, atol=1e-4)
