"""A row gets its own adapter, or the call raises: layouts of real models, and random ones, against each sequence alone."""

import copy
import os
import random

import peft
import pytest
import torch
import transformers
from torch import nn

import peftkern

NAMES = ["one", "two", None, "three"]
# PEFTKERN_ROW_CASES=500 for a long look.
CASES = int(os.environ.get("PEFTKERN_ROW_CASES", "60"))


K = 6


def _double(t):
    return torch.cat([t, t], 0)


def _swap_halves(t):
    return torch.cat([t[t.shape[0] // 2 :], t[: t.shape[0] // 2]], 0)


# Applied to rows (..., K) and to their labels (..., 1) alike.
MOVES = {
    "transpose": lambda t: t.transpose(0, 1) if t.dim() > 2 else t,
    "flatten": lambda t: t.reshape(-1, t.shape[-1]),
    "pairs": lambda t: t.reshape(-1, 2, t.shape[-1]) if t.shape[:-1].numel() % 2 == 0 else t,
    "double": _double,
    "beams": lambda t: t.repeat_interleave(2, 0),
    "one more": lambda t: torch.cat([t, t[:1]], 0),
    "first out": lambda t: t[1:],
    "halves": _swap_halves,
    "every other": lambda t: t[::2],
    "reverse": lambda t: t.flip(0),
    "axis": lambda t: t.unsqueeze(1),
    "squeeze": lambda t: t.squeeze(1) if t.dim() > 3 else t,
    "window": lambda t: t.unfold(0, 2, 1).movedim(-1, 1) if t.shape[0] > 1 else t,
    "last of all": lambda t: t[:, -1] if t.dim() > 2 else t,
    "rotate": lambda t: torch.roll(t, 1, 0),
    "contiguous": lambda t: t.contiguous().view(t.shape),
    "into a buffer": lambda t: torch.zeros_like(t).copy_(t),
    "into part of a buffer": lambda t: _written(t),
}


def _written(t):
    buffer = t.new_zeros((t.shape[0] + 1, *t.shape[1:]))
    buffer[1:] = t
    return buffer[1:]


class Program(nn.Module):
    """Linear layers with moves between them; data-dependent orders too. Returns (rows, labels).

    Each row depends on its own sequence alone, so a batch must equal its sequences run one by one.
    """

    def __init__(self, seed: int):
        super().__init__()
        choose = random.Random(seed)
        self.steps = []
        for _ in range(choose.randint(1, 4)):
            self.steps += choose.choices([*MOVES, "sorted", "residual"], k=choose.randint(0, 2))
            self.steps.append("linear")
        self.layers = nn.ModuleList(nn.Linear(K, K) for _ in range(self.steps.count("linear")))

    def forward(self, x, labels):
        layers = iter(self.layers)
        for step in self.steps:
            if step == "linear":
                x = torch.tanh(next(layers)(x))
            elif step == "residual":
                x = x + torch.nn.functional.layer_norm(x, (K,))
            elif step == "sorted":
                x, labels = x.reshape(-1, K), labels.reshape(-1, 1)
                order = x.sum(-1).argsort()
                x, labels = x[order], labels[order]
            else:
                x, labels = MOVES[step](x), MOVES[step](labels)
        return x, labels


def attached(model, targets, folder, **options):
    """(plain model, its PEFT twin with adapters a, b and c, what attach_adapters gives)."""
    twin = None
    for name, rank in zip(("one", "two", "three"), (2, 4, 3)):
        config = peft.LoraConfig(r=rank, lora_alpha=8, target_modules=targets)
        if twin is None:
            twin = peft.get_peft_model(model, config, adapter_name=name)
        else:
            twin.add_adapter(name, config)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in twin.named_parameters():
            if "lora_" in name:
                p.copy_(torch.randn(p.shape, generator=g) * 0.3)
    twin.save_pretrained(folder)
    plain = copy.deepcopy(twin).unload().eval()
    return plain, twin.eval(), peftkern.attach_adapters(plain, {n: folder / n for n in twin.peft_config}, **options)


def alone(twin, name, *args, **kwargs):
    """The twin's output for one sequence with one adapter."""
    if name is None:
        with twin.disable_adapter():
            return twin(*args, **kwargs)
    twin.set_adapter(name)
    return twin(*args, **kwargs)


def rows_of(y, labels):
    return {int(n): row for n, row in zip(labels.reshape(-1), y.reshape(-1, y.shape[-1]))}


@pytest.mark.parametrize("part", range(4))
@torch.no_grad()
def test_random_layouts_are_right_or_raise(tmp_path, part):
    right = raised = 0
    for seed in range(part, CASES, 4):
        choose = random.Random(seed)
        torch.manual_seed(seed)
        B, T = choose.choice([2, 3, 4]), choose.choice([1, 2, 3, 4])
        names = [choose.choice(NAMES) for _ in range(B)]
        plain, twin, multi = attached(Program(seed), r"layers\.\d+", tmp_path / str(seed))
        labels = torch.arange(B * T).view(B, T, 1)
        # Every step but a layer moves whole rows: without the moves a row's value is the same.
        twin.base_model.model.steps = [step for step in plain.steps if step in ("linear", "residual")]
        for _ in range(2):  # followed, then remembered
            x = torch.randn(B, T, K)
            try:
                with multi.use(names):
                    y, ids = plain(x, labels)
            except ValueError as error:
                assert "whose rows these are is not known" in str(error)
                raised += 1
                continue
            expected = {}
            for b, name in enumerate(names):
                expected |= rows_of(*alone(twin, name, x[b : b + 1], labels[b : b + 1]))
            for label, row in rows_of(y, ids).items():
                torch.testing.assert_close(
                    row, expected[label], rtol=1e-4, atol=1e-5, msg=f"seed {seed}, {plain.steps}"
                )
            right += 1
    print(right, raised)
    assert right and raised


def _model(kind):
    t, sizes = transformers, dict(vocab_size=64)
    if kind == "opt":
        return t.OPTForCausalLM(
            t.OPTConfig(
                hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48, max_position_embeddings=64,
                word_embed_proj_dim=32, dropout=0.0, **sizes,
            )
        )  # fmt: skip
    if kind == "xlnet":
        return t.XLNetLMHeadModel(t.XLNetConfig(d_model=32, n_layer=2, n_head=4, d_inner=48, **sizes))
    if kind == "longformer":
        return t.LongformerForMaskedLM(
            t.LongformerConfig(
                hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48,
                attention_window=[4], max_position_embeddings=66, **sizes,
            )
        )  # fmt: skip
    if kind == "qwen2_moe":
        return t.Qwen2MoeForCausalLM(
            t.Qwen2MoeConfig(
                hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, num_experts=2, num_experts_per_tok=2, moe_intermediate_size=16,
                shared_expert_intermediate_size=24, **sizes,
            )
        )  # fmt: skip
    if kind == "switch":
        return t.SwitchTransformersForConditionalGeneration(
            t.SwitchTransformersConfig(
                d_model=32, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=2, num_heads=4, num_experts=2,
                decoder_start_token_id=0, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, **sizes,
            )
        )  # fmt: skip
    return t.DebertaV2ForTokenClassification(
        t.DebertaV2Config(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
            relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=4, **sizes,
        )
    )  # fmt: skip


KNOWN = {
    "opt": ["q_proj", "fc1", "fc2"],  # fc1 gets (B * T, K)
    "xlnet": ["layer_1", "layer_2"],  # (T, B, K)
    "longformer": ["query", "value", "intermediate.dense"],  # (T, B, K), and (B, T, K)
    "qwen2_moe": ["q_proj", "shared_expert.gate_proj", "shared_expert.down_proj"],  # (B * T, K), and behind experts
    "switch": ["q", "v"],
    "deberta": ["query_proj", "value_proj"],
}
UNKNOWABLE = {
    "longformer": ["attention.output.dense"],  # behind overlapping windows
    "switch": ["wi"],  # an expert's tokens, of any sequence
    "deberta": ["pos_key_proj"],  # positions that all sequences share
}


def _inputs(kind, B, T):
    inputs = {"input_ids": torch.randint(1, 64, (B, T)), "attention_mask": torch.ones(B, T, dtype=torch.long)}
    if kind == "switch":
        inputs["decoder_input_ids"] = torch.randint(1, 64, (B, 3))
    return inputs


@pytest.mark.parametrize("kind", KNOWN)
@torch.no_grad()
def test_layouts_of_real_models(tmp_path, kind):
    torch.manual_seed(0)
    plain, twin, multi = attached(_model(kind), KNOWN[kind], tmp_path)
    # As many tokens as sequences, twice: followed, then remembered. Then other sizes, and one token.
    for B, T in ((4, 4), (4, 4), (3, 8), (2, 1)):
        names, inputs = NAMES[:B], _inputs(kind, B, T)
        with multi.use(names):
            y = plain(**inputs)[0]
        for b, name in enumerate(names):
            expected = alone(twin, name, **{n: t[b : b + 1] for n, t in inputs.items()})[0]
            torch.testing.assert_close(y[b : b + 1], expected, rtol=1e-3, atol=1e-4)
    # One adapter for all fits everything.
    with multi.use("two"):
        y = plain(**inputs)[0]
    torch.testing.assert_close(y, alone(twin, "two", **inputs)[0], rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_layouts_are_known_to_batches_that_come_later(tmp_path):
    """The first batch leaves layers alone that the next one changes; a later adapter brings layers of its own."""
    torch.manual_seed(0)
    plain, twin, multi = attached(_model("opt"), KNOWN["opt"], tmp_path / "all")
    config = peft.LoraConfig(r=2, target_modules=["k_proj"], init_lora_weights=False)
    few = peft.get_peft_model(copy.deepcopy(twin).unload(), config)
    few.save_pretrained(tmp_path / "few")
    multi.remove("three")
    multi.add("few", tmp_path / "few")
    inputs = _inputs("opt", 2, 5)
    for names in (["few", None], ["one", "few"], ["two", "one"], [None, "few"]):
        with multi.use(names):
            y = plain(**inputs).logits
        for b, name in enumerate(names):
            own = {n: t[b : b + 1] for n, t in inputs.items()}
            expected = few(**own) if name == "few" else alone(twin, name, **own)
            torch.testing.assert_close(y[b : b + 1], expected.logits, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", UNKNOWABLE)
@torch.no_grad()
def test_rows_that_cannot_be_told_apart_raise(tmp_path, kind):
    plain, twin, multi = attached(_model(kind), UNKNOWABLE[kind], tmp_path)
    for T in (4, 8):
        inputs = _inputs(kind, 4, T)
        with multi.use(NAMES), pytest.raises(ValueError, match=rf"{UNKNOWABLE[kind][0]} gets .*use\('name'\)"):
            plain(**inputs)
        for names in ("two", ["two"], ["two"] * 4, ["two"] * 7):
            with multi.use(names):
                y = plain(**inputs)[0]
            torch.testing.assert_close(y, alone(twin, "two", **inputs)[0], rtol=1e-3, atol=1e-4)
        with multi.use([None] * 4):
            assert torch.equal(plain(**inputs)[0], alone(twin, None, **inputs)[0])


def _llava():
    vision = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    text = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=63, vision_feature_layer=-1
    )
    return transformers.LlavaForConditionalGeneration(config)


@pytest.mark.parametrize("images", [(3, 1), (2, 0), (1, 1)], ids=str)
@torch.no_grad()
def test_images_are_not_sequences(tmp_path, images):
    """Two prompts with so many images: the language model's rows are known, the vision tower's are not."""
    rows = [[1] + [63] * 4 * n + [2] * (13 - 4 * n) for n in images]
    inputs = {"input_ids": torch.tensor(rows), "pixel_values": torch.randn(sum(images), 3, 8, 8)}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    plain, twin, multi = attached(_llava(), r".*language_model.*\.(q_proj|down_proj)", tmp_path / "text")
    with multi.use(["one", "two"]):
        y = plain(**inputs).logits
    start = 0
    for b, (name, n) in enumerate(zip(("one", "two"), images)):
        own = {"input_ids": inputs["input_ids"][b : b + 1], "attention_mask": inputs["attention_mask"][b : b + 1]}
        if n:
            own["pixel_values"] = inputs["pixel_values"][start : start + n]
        torch.testing.assert_close(y[b : b + 1], alone(twin, name, **own).logits, rtol=1e-3, atol=1e-4)
        start += n
    plain, twin, multi = attached(_llava(), ["q_proj", "down_proj"], tmp_path / "both")
    with multi.use(["one", "two"]), pytest.raises(ValueError, match=r"vision_tower.* gets .*is not known"):
        plain(**inputs)
    with multi.use("two"):
        y = plain(**inputs).logits
    torch.testing.assert_close(y, alone(twin, "two", **inputs).logits, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_a_batch_of_another_size_raises(tmp_path):
    plain, twin, multi = attached(_model("opt"), KNOWN["opt"], tmp_path)
    inputs = _inputs("opt", 4, 5)
    for names in (["one", "two"], ["one", "two", None], NAMES * 2, []):
        with multi.use(names), pytest.raises(ValueError, match=rf"names {len(names)} sequences, .*\(4, 5\)"):
            plain(**inputs)
    # Runs of rows that the caller knows.
    with multi.use(["one", "two"], repeats=2):
        y = plain(**inputs).logits
        with pytest.raises(ValueError, match=r"names 2 sequences, 2 rows each, .*\(2, 5\)"):
            plain(input_ids=inputs["input_ids"][:2])
    for b, name in enumerate(("one", "one", "two", "two")):
        own = {n: t[b : b + 1] for n, t in inputs.items()}
        torch.testing.assert_close(y[b : b + 1], alone(twin, name, **own).logits, rtol=1e-3, atol=1e-4)
    for repeats in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="repeats is"):
            multi.use(["one"], repeats=repeats)
    # A part of the model that no batch enters: the rows of a layer by itself are not known.
    layer = plain.model.decoder.layers[0].fc1
    with multi.use(NAMES), pytest.raises(ValueError, match="outside of a call of the model"):
        layer(torch.randn(4, 5, 32))
    with multi.use("one"):
        layer(torch.randn(4, 5, 32))
    # One that it does enter.
    with multi.use(NAMES):
        torch.testing.assert_close(
            plain.lm_head(plain.model(**inputs)[0]), plain(**inputs).logits, rtol=1e-5, atol=1e-5
        )


@torch.no_grad()
def test_generate_that_multiplies_rows_in_its_own_way_raises(tmp_path):
    """MusicGen: a row for each codebook, and guidance that doubles the batch by concatenation."""
    t = transformers
    config = t.MusicgenConfig(
        text_encoder=t.T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2).to_dict(),
        audio_encoder=t.EncodecConfig(
            hidden_size=8, num_filters=2, codebook_size=32, codebook_dim=8, upsampling_ratios=[2, 2], num_lstm_layers=1,
            target_bandwidths=[24.0], sampling_rate=16,
        ).to_dict(),
        decoder=t.MusicgenDecoderConfig(
            vocab_size=32, hidden_size=16, ffn_dim=24, num_hidden_layers=1, num_attention_heads=2, num_codebooks=2,
            max_position_embeddings=32, pad_token_id=31, bos_token_id=31,
        ).to_dict(),
    )  # fmt: skip
    model = t.MusicgenForConditionalGeneration(config).eval()
    plain, twin, multi = attached(model, r"(decoder.*|text_encoder.*)\.(q_proj|v_proj|q|v)", tmp_path)
    ids = torch.randint(1, 60, (2, 5))
    inputs = {"inputs": ids, "attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 4}
    twin.set_adapter("one")
    for guidance, rows in ((1.0, 4), (3.0, 8)):
        with multi.use(["one", "two"]), pytest.raises(ValueError, match=rf"names 2 sequences.*\({rows}, "):
            plain.generate(**inputs, guidance_scale=guidance)
        with multi.use("one"):
            y = plain.generate(**inputs, guidance_scale=guidance)
        assert torch.equal(y, twin.generate(**inputs, guidance_scale=guidance))
