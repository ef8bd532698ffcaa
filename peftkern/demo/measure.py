"""What the demo measures beside time: bytes saved for backward, retrieval accuracy, agreement after reloading."""

from __future__ import annotations

import tempfile

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from .corpus import Pair
from .model import Tokenizer, base_model, embed
from .train import Batch, contrastive_loss


def saved_bytes(model: nn.Module, batch: Batch) -> int:
    """Bytes that one training step's forward keeps for backward: distinct storages, parameters and buffers left out."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        # Holding the storage keeps its address from being used again.
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        contrastive_loss(model, batch)
    return sum(storage.nbytes() for storage in kept.values())


@torch.no_grad()
def embeddings(model: nn.Module, tokenizer: Tokenizer, texts: list[str], batch: int = 64) -> Tensor:
    """Embeddings (len(texts), H) in evaluation mode. Texts of like length share a batch: less padding."""
    training = model.training
    model.eval()
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    out: list[Tensor] = [torch.empty(0)] * len(texts)
    for start in range(0, len(order), batch):
        chunk = order[start : start + batch]
        for i, row in zip(chunk, embed(model, tokenizer([texts[i] for i in chunk]))):
            out[i] = row
    model.train(training)
    return torch.stack(out)


def retrieval_accuracy(model: nn.Module, tokenizer: Tokenizer, pairs: list[Pair]) -> float:
    """Share of names whose nearest docstring, among all of ``pairs``, is their own."""
    names = embeddings(model, tokenizer, [p.name for p in pairs])
    texts = embeddings(model, tokenizer, [p.text for p in pairs])
    nearest = (names @ texts.T).argmax(1)
    return (nearest == torch.arange(len(pairs))).float().mean().item()


def copy_adapter(source: PeftModel, target: PeftModel) -> None:
    """Give ``target`` the adapter weights of ``source``, through PEFT's own state dict."""
    set_peft_model_state_dict(target, get_peft_model_state_dict(source))


def reload_difference(model: PeftModel, dtype: torch.dtype, tokenizer: Tokenizer, texts: list[str]) -> float:
    """Save the adapter of ``model``, load it into stock PEFT: largest difference of any embedding's entry."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        stock = PeftModel.from_pretrained(base_model(dtype), folder)
    here = embeddings(model, tokenizer, texts)
    there = embeddings(stock, tokenizer, texts)
    return (here - there).abs().max().item()
