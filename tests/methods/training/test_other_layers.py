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


def _wav2vec2():
    config = transformers.Wav2Vec2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, conv_dim=(8, 8), conv_kernel=(4, 2),
        conv_stride=(2, 2), num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, num_labels=3, layerdrop=0.0,
        apply_spec_augment=False, hidden_dropout=0.0, attention_dropout=0.0, feat_proj_dropout=0.0, activation_dropout=0.0,
        final_dropout=0.0, initializer_range=0.2,
    )  # fmt: skip
    model = transformers.Wav2Vec2ForSequenceClassification(config)
    targets = r".*(feature_extractor\.conv_layers\.\d\.conv|q_proj)"
    return model, targets, {"input_values": torch.randn(3, 60), "labels": torch.tensor([0, 1, 2])}


def _text(kind, embedding, linear):
    model, _ = small.base(kind)
    return model, f".*({embedding}|{linear})", small.batch(kind, 0)


MODELS = {
    "vit": _vit,
    "resnet": _resnet,
    "wav2vec2": _wav2vec2,
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
