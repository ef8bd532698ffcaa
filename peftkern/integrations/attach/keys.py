"""Names of an adapter's tensors: as PEFT and diffusers write them, and whose they are where they are neither."""

from __future__ import annotations

import functools
import re
from collections.abc import Collection
from typing import NamedTuple

from ...methods.registry import METHODS

PREFIX = "base_model.model."
_SHARED = "base_model"
# Of a module of which PEFT adapts two parameters, the adapter of the first one lies inside of the other's.
INNER = "base_layer."
# diffusers' own spellings, the older ones with the projection's name in that of the tensor.
_DIFFUSERS = re.compile(
    r"(?P<module>.+?)(?:\.processor)?(?:\.lora(?:_linear_layer)?|\.to_(?P<old>q|k|v|out)_lora)\.(?P<part>down|up)\.weight"
)
# What training alone reads (VeLoRA, MonteCLoRA).
_TRAINING = re.compile(r".+\.lora_(velora_embed|monteclora_sampler)(\..+)?")
_WRAPPED = re.compile(r"\.(base_layer|original_module|modules_to_save(\.[^.]+)?)(?=\.[^.]+$)")
# How the keys of other tools look; the first that fits counts.
_TOOLS = {
    r"lora_(unet|te\d?|transformer|prior)_.*|.*lora_(down|up)(\..*)?": "kohya's sd-scripts",
    r".*\.loras\..*": "the adapters library",
    r".*\.lora_[ab]\.weight": "torchtune",
    r".*\.lora_[ab]": "MLX",
    r".*\.lora_[AB]": "loralib or LitGPT",
    r".*\.(hada_(w|t)|lokr_(w|t)|oft_(diag|blocks)).*": "LyCORIS",
    r".*\.(adapter|lora_\w*adapter)\.linear_(in|out)\.weight": "NeMo",
    r".*\.processor\.\w*lora\d?\.(down|up)\.weight": "XLabs",
}


class Key(NamedTuple):
    """A tensor of an adapter. module: None if all share it; part: its name; adapter: the adapter's, where the key has it."""

    module: str | None
    part: str
    adapter: str | None


def parse(key: str, names: Collection[str], shared: Collection[str] = ()) -> Key | None:
    """The key of one of these tensors of a layer, or of all layers, as PEFT writes it, prefix included."""
    found = _parsed(key, names)
    if found is not None and found.module.startswith(PREFIX):
        module = found.module.removeprefix(PREFIX)
        if f"{module}.".endswith(f".{INNER}"):
            return found._replace(module=module[: -len(INNER)], part=INNER + found.part)
        return found._replace(module=module)
    found = _parsed(key, shared)
    return found._replace(module=None) if found is not None and found.module == _SHARED else None


def parse_diffusers(key: str, names: Collection[str], shared: Collection[str] = ()) -> Key | None:
    """The key of one of these tensors of a layer as diffusers writes it, LoRA's in any of its spellings."""
    found = _parsed(key, names)
    if found is not None:
        return found
    match = _DIFFUSERS.fullmatch(key)
    if match is None:
        return None
    module, old = match["module"], match["old"]
    if old is not None:
        text = module.endswith(".self_attn")
        last = {"out": "out_proj" if text else "to_out.0"}.get(old, f"{old}_proj" if text else f"to_{old}")
        module = f"{module}.{last}"
    return Key(module, {"down": "lora_A.weight", "up": "lora_B.weight"}[match["part"]], None)


def beside(key: str, part: str, other: str) -> str:
    """The key of another tensor of the layer, written like this one."""
    (head, _, tail), (new, _, end) = part.partition("."), other.partition(".")
    pattern = rf"\.{head}(\.[^.]+)?{re.escape(f'.{tail}' if tail else '')}"
    match = re.search(f"{pattern}$", key)
    if match is None:
        return key
    return f"{key[: match.start()]}.{new}{match[1] or ''}{f'.{end}' if end else ''}"


@functools.cache
def _pattern(name: str) -> re.Pattern[str]:
    # The adapter's name, if it is there, follows the first part of the tensor's.
    head, _, tail = name.partition(".")
    adapter = r"(?:\.(?P<adapter>[^.]+))?" if tail else r"(?:\.(?P<adapter>(?!weight$)[^.]+))?"
    return re.compile(rf"(?P<module>.+)\.{head}{adapter}{re.escape(f'.{tail}' if tail else '')}")


def _parsed(key: str, names: Collection[str]) -> Key | None:
    for name in names:
        match = _pattern(name).fullmatch(key)
        if match is not None:
            return Key(match["module"], name, match["adapter"])
    return None


def for_training(key: str) -> bool:
    """Whether the tensor has no part in inference."""
    return _TRAINING.fullmatch(key) is not None


def copied(key: str) -> str | None:
    """The weight of the base model that a key of PEFT's repeats, if it is one."""
    name = _WRAPPED.sub("", key.removeprefix(PREFIX))
    families = {part.partition("_")[0] for m in METHODS.values() if m.stored is not None for part in m.stored.names}
    adapters = re.search(rf"\.({'|'.join(families)})_", name)
    plain = key.startswith(PREFIX) and not adapters and "." in name and _tool(key) is None
    return name if plain else None


def complaint(key: str) -> str:
    """Why this key is not read."""
    tool = _tool(key)
    if tool is None:
        return "is no part of the adapter that the config describes, on a linear layer"
    return f"is written as {tool} does, which is not read here: convert it to PEFT's format first"


def _tool(key: str) -> str | None:
    return next((tool for pattern, tool in _TOOLS.items() if re.fullmatch(pattern, key)), None)
