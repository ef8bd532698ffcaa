"""Programs that move rows by other means than whole-tensor operations, and calls that come in by other ways."""

import copy

import peft
import pytest
import torch
import transformers
from torch import nn

import peftkern

K = 6
NAMES = ["one", None, "two", "one"]


def _flipped_in_place(t):
    t = t.clone()
    t[:] = t.flip(0)
    return t


def _swapped(t):
    t = t.clone()
    first = t[0].clone()
    t[0] = t[1]
    t[1] = first
    return t


def _through_an_alias(t):
    t = t.clone()
    t.view(-1, t.shape[-1]).copy_(t.flip(0).reshape(-1, t.shape[-1]))
    return t


def _half_flipped(t):
    t = t.clone()
    t[:2] = t[:2].flip(0)
    return t


def _foreach(t):
    t = t.clone()
    torch._foreach_copy_([t], [t.flip(0)])
    return t


def _scattered(t):
    order = torch.arange(t.shape[0]).flip(0)
    return t.clone().index_copy_(0, order, t)


def _put(t):
    order, y = torch.arange(t.shape[0]).flip(0), t.clone()
    y[order] = t
    return y


def _shifted(t):
    y = torch.zeros_like(t)
    y[:, 1:] = t[:, :-1]
    y[:, 0] = t[:, 0]
    return y


def _into_transposed(t):
    y = t.new_zeros(t.shape[1], t.shape[0], t.shape[2])
    y.transpose(0, 1).copy_(t)
    return y


# Applied to rows (B, T, K) and labels (B, T, 1) alike. False: cannot be known, so it must raise.
MOVES = {
    _flipped_in_place: False,
    _swapped: False,
    _through_an_alias: False,
    _half_flipped: False,
    _foreach: False,
    _scattered: False,
    _put: False,
    lambda t: torch.slice_scatter(t, t.flip(0), 0): False,
    lambda t: torch.from_numpy(t.detach().numpy()[::-1].copy()): False,
    lambda t: torch.stack(t.unbind(0)[::-1]): False,
    lambda t: (torch.eye(t.shape[0]).flip(0) @ t.flatten(1).to(torch.float32)).view(t.shape): False,
    lambda t: t.clone().transpose_(0, 1): True,
    lambda t: t.contiguous().view(torch.int8).view(t.dtype): True,
    lambda t: torch.cat([t, t]).flatten(0, 1): True,  # round and round, in runs
    lambda t: torch.einsum("btk->tbk", t): True,
    lambda t: torch.vmap(torch.clone, out_dims=1)(t): True,
    _shifted: True,
    _into_transposed: True,
}


class Moved(nn.Module):
    """Two layers with a move between them, or two transposed halves where a flag, a tensor or a value says so."""

    def __init__(self, move=None, decide=None):
        super().__init__()
        self.layers, self.move, self.decide = nn.ModuleList(nn.Linear(K, K) for _ in range(2)), move, decide

    def forward(self, x, labels, flag=False, extra=None):
        x = torch.tanh(self.layers[0](x))
        if self.move is not None:
            x, labels = self.move(x), self.move(labels)
        if flag or extra is not None or (self.decide is not None and self.decide(x)):
            x, labels = x.transpose(0, 1), labels.transpose(0, 1)
        return self.layers[1](x), labels


def attached(model, folder, targets=r"layers\.\d", **options):
    """(plain model, what attach_adapters gives for two adapters)."""
    twin = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=8, target_modules=targets), adapter_name="one")
    twin.add_adapter("two", peft.LoraConfig(r=3, lora_alpha=8, target_modules=targets))
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in twin.named_parameters():
            if "lora_" in name:
                p.copy_(torch.randn(p.shape, generator=g) * 0.3)
    twin.save_pretrained(folder)
    plain = twin.unload().eval().requires_grad_(False)
    return plain, peftkern.attach_adapters(plain, {n: folder / n for n in ("one", "two")}, **options)


def inputs(B, T):
    return torch.randn(B, T, K), torch.arange(B * T, dtype=torch.float32).view(B, T, 1)


def check(multi, model, names, y, ids, *args, **kwargs):
    """Each row is the one of its label where all rows take its sequence's adapter (which is stock's: test_attach)."""
    T = args[0].shape[1]
    alone = {}
    for name in set(names):
        with multi.use(name):
            alone[name] = model(*args, **kwargs)
    for row, label in zip(y.reshape(-1, K), ids.reshape(-1), strict=True):
        own, places = alone[names[int(label) // T]]
        expected = own.reshape(-1, K)[places.reshape(-1) == label][0]
        torch.testing.assert_close(row, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_moves_by_other_means_are_right_or_raise(tmp_path, mode):
    plain, multi = attached(Moved(), tmp_path)
    for move, known in MOVES.items():
        multi.layouts.clear()
        plain.move = move
        for B, T in ((4, 4), (4, 4), (3, 6)):
            args, names = inputs(B, T), NAMES[:B]
            with mode(), multi.use(names):
                if known:
                    check(multi, plain, names, *plain(*args), *args)
                else:
                    with pytest.raises(ValueError, match="is not known"):
                        plain(*args)


@torch.no_grad()
def test_what_values_decide_is_not_remembered(tmp_path):
    plain, multi = attached(Moved(), tmp_path)
    args = inputs(4, 4)
    with multi.use(NAMES):
        # An order that happens to be the one that is there; and a way that later values do not take.
        plain.move = lambda t: t[torch.tensor([int(n) for n in torch.arange(4)])]
        with pytest.raises(ValueError, match="is not known"):
            plain(*args)
        plain.move = lambda t: t[torch.arange(4)]
        check(multi, plain, NAMES, *plain(*args), *args)
        plain.move = None
        for decide in (lambda x: x.sum() > 0, lambda x: x.mean().item() > 0, lambda x: torch.equal(x, x.abs())):
            multi.layouts.clear()
            plain.decide = decide
            for sign in (-1, 1, 1, -1):
                plain.layers[0].bias.copy_(torch.full((K,), 9.0 * sign))
                check(multi, plain, NAMES, *plain(*args), *args)


@torch.no_grad()
def test_graphs_take_the_way_of_their_arguments(tmp_path):
    plain, multi = attached(Moved(), tmp_path)
    torch._dynamo.reset()
    compiled = torch.compile(plain, backend="eager", fullgraph=True)
    args = inputs(4, 4)
    with multi.use(NAMES):
        for kwargs in ({}, {"flag": True}, {"extra": torch.ones(1)}):
            check(multi, plain, NAMES, *compiled(*args, **kwargs), *args, **kwargs)
        with pytest.raises(RuntimeError, match=r"cannot be followed.*such as extra.*one adapter"):
            compiled(*args, extra={"mask": torch.ones(1)})
    with multi.use("two"):
        compiled(*args, extra={"mask": torch.ones(1)})


@torch.no_grad()
def test_another_way_than_before_says_so_and_is_followed(tmp_path):
    plain, multi = attached(Moved(), tmp_path)
    args = inputs(4, 4)
    with multi.use(NAMES):
        plain(*args)
        plain.move = torch.Tensor.contiguous  # nothing
        plain(*args)
        plain.move = lambda t: t.flatten(0, 1)
        others = dict(multi.layouts)
        with pytest.raises(ValueError, match=r"went another way.*call again"):
            plain(*args)
        assert all(others.values())  # calls of other threads go on with what they have
        check(multi, plain, NAMES, *plain(*args), *args)


class Prompted(nn.Module):
    """A text model with images, which it asks for first, or a model of past values."""

    def __init__(self, main):
        super().__init__()
        self.layers, self.main_input_name = nn.ModuleList(nn.Linear(K, K) for _ in range(2)), main

    def forward(self, pixel_values=None, inputs_embeds=None, past_values=None):
        if past_values is not None:
            return self.layers[0](past_values)
        return self.layers[0](pixel_values), None if inputs_embeds is None else self.layers[1](inputs_embeds)


@torch.no_grad()
def test_what_is_counted(tmp_path):
    x = torch.randn(2, 3, K)
    plain, multi = attached(Prompted("past_values"), tmp_path / "past")
    with multi.use(["one", "two"]):
        y = plain(past_values=x)
    for b, name in enumerate(("one", "two")):
        with multi.use(name):
            torch.testing.assert_close(y[b], plain(past_values=x)[b])
    plain, multi = attached(Prompted("pixel_values"), tmp_path / "images")
    with multi.use(["one", "two"]):
        plain(pixel_values=x)
        # Both images may be the first prompt's.
        with pytest.raises(ValueError, match=r"layers\.0 gets .*is not known"):
            plain(pixel_values=x.clone(), inputs_embeds=x)


def _sizes():
    return dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)


def _bart():
    return transformers.BartForConditionalGeneration(
        transformers.BartConfig(
            vocab_size=64, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, pad_token_id=0, eos_token_id=2,
        )
    )  # fmt: skip


def _whisper():
    return transformers.WhisperForConditionalGeneration(
        transformers.WhisperConfig(
            vocab_size=64, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, num_mel_bins=8, max_source_positions=8,
            pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        )
    )  # fmt: skip


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(
    "build, targets",
    [
        (_whisper, ["q_proj", "v_proj", "fc1"]),  # its encoder's input is no item of a prompt
        (_bart, ["q_proj", "v_proj", "out_proj", "fc1"]),  # its decoder's input is the encoder's, shifted
        (lambda: transformers.DebertaForMaskedLM(transformers.DebertaConfig(**_sizes())), ["in_proj", "dense"]),
        (lambda: transformers.ConvBertForMaskedLM(transformers.ConvBertConfig(**_sizes())), ["query", "dense"]),
    ],
)
def test_models_in_inference_mode(tmp_path, build, targets, mode):
    plain, multi = attached(build(), tmp_path, targets)
    with mode():
        for B, T in ((4, 4), (4, 4), (3, 5)):
            inputs = {"input_ids": torch.randint(3, 64, (B, T))}
            if build is _bart:
                inputs["attention_mask"] = torch.ones(B, T, dtype=torch.long)
            if build is _whisper:
                inputs = {"input_features": torch.randn(B, 8, 16), "decoder_input_ids": inputs["input_ids"]}
            with multi.use(NAMES[:B]):
                y = plain(**inputs).logits
            assert multi.layouts  # masks are looked at, between layers too: that decides about no rows
            for b, name in enumerate(NAMES[:B]):
                with multi.use(name):
                    expected = plain(**{n: t[b : b + 1] for n, t in inputs.items()}).logits
                torch.testing.assert_close(y[b : b + 1], expected, rtol=1e-3, atol=1e-4)


def _llama():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**_sizes(), pad_token_id=0))


def test_a_first_call_is_computed_again_in_backward(tmp_path):
    plain, multi = attached(_llama(), tmp_path, ["q_proj", "down_proj"])
    plain.train()
    x, gradients = torch.randn(2, 4, 32), []
    for checkpointing in (True, True, False):
        if checkpointing:
            plain.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            plain.gradient_checkpointing_disable()
        z = x.clone().requires_grad_(True)
        with multi.use(["one", "two"]):
            plain(inputs_embeds=z, use_cache=False).logits.square().mean().backward()
        gradients.append(z.grad)
    torch.testing.assert_close(gradients[0], gradients[2])
    torch.testing.assert_close(gradients[1], gradients[2])


@torch.no_grad()
def test_what_would_lose_an_adapter_raises(tmp_path):
    plain, multi = attached(_llama(), tmp_path, ["q_proj", "lm_head"])
    ids = torch.randint(3, 64, (2, 4))
    with multi.use("one"):
        y = plain(ids).logits
        with pytest.raises(RuntimeError, match=r"torch\.jit\.trace would keep"):
            torch.jit.trace(lambda i: plain(i, use_cache=False).logits, ids)
        # A wrapper around a layer is no other layer.
        layer, plain.lm_head = plain.lm_head, nn.Sequential(plain.lm_head)
        torch.testing.assert_close(plain(ids).logits, y)
        plain.lm_head = layer
        plain.resize_token_embeddings(70)
        with pytest.raises(RuntimeError, match=r"lm_head was replaced .*resize_token_embeddings.*detach"):
            plain(ids)
    plain(ids)


@torch.no_grad()
def test_two_on_one_model_are_detached_in_any_order(tmp_path):
    ids = torch.randint(3, 64, (2, 4))
    for order in (0, 1):
        plain, first = attached(_llama(), tmp_path / f"q{order}", ["q_proj"], outside="error")
        attached(copy.deepcopy(plain), tmp_path / f"v{order}", ["v_proj"])
        second = peftkern.attach_adapters(plain, {"one": tmp_path / f"v{order}" / "one"})
        with first.use(["one", None]), second.use([None, "one"]):
            y = plain(ids).logits
        with first.use("one"):
            torch.testing.assert_close(y[0], plain(ids).logits[0])
        with first.use(None), second.use("one"):
            torch.testing.assert_close(y[1], plain(ids).logits[1])
        multis = [first, second]
        multis.pop(order).detach()
        with multis[0].use("one"):
            plain(ids)
        multis[0].detach()
        plain(ids)
        assert not [m for m in plain.modules() if "forward" in m.__dict__]


@torch.no_grad()
def test_autocast_takes_inputs_that_are_cast_already(tmp_path):
    plain, multi = attached(Moved(), tmp_path)
    args = inputs(4, 4)
    with torch.autocast("cpu", torch.bfloat16), multi.use(NAMES):
        y, _ = plain(args[0].bfloat16(), args[1])
    assert y.dtype == torch.bfloat16
    with multi.use(NAMES):
        torch.testing.assert_close(y.float(), plain(*args)[0], rtol=0.1, atol=0.1)
