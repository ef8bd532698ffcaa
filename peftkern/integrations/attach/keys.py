"""Names of an adapter's tensors: as PEFT and diffusers write them, and whose they are where they are neither."""

from __future__ import annotations

import re
from typing import NamedTuple

PREFIX = "base_model.model."
_PEFT = re.compile(r"(?P<module>.+)\.lora_(?P<part>[AB])(?:\.(?P<adapter>[^.]+))?\.weight")
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
    """A tensor of a plain LoRA adapter. part: "A" or "B"; adapter: its name, where the key holds one."""

    module: str
    part: str
    adapter: str | None


def parse(key: str) -> Key | None:
    """The key of a LoRA weight as PEFT writes it, prefix included."""
    match = _PEFT.fullmatch(key)
    if match is None or not key.startswith(PREFIX):
        return None
    return Key(match["module"].removeprefix(PREFIX), match["part"], match["adapter"])


def parse_diffusers(key: str) -> Key | None:
    """The key of a LoRA weight as diffusers writes it, in any of its spellings."""
    match = _PEFT.fullmatch(key)
    if match is not None:
        return Key(match["module"], match["part"], match["adapter"])
    match = _DIFFUSERS.fullmatch(key)
    if match is None:
        return None
    module, old = match["module"], match["old"]
    if old is not None:
        text = module.endswith(".self_attn")
        last = {"out": "out_proj" if text else "to_out.0"}.get(old, f"{old}_proj" if text else f"to_{old}")
        module = f"{module}.{last}"
    return Key(module, {"down": "A", "up": "B"}[match["part"]], None)


def for_training(key: str) -> bool:
    """Whether the tensor has no part in inference."""
    return _TRAINING.fullmatch(key) is not None


def copied(key: str) -> str | None:
    """The weight of the base model that a key of PEFT's repeats, if it is one."""
    name = _WRAPPED.sub("", key.removeprefix(PREFIX))
    plain = key.startswith(PREFIX) and ".lora_" not in name and "." in name and _tool(key) is None
    return name if plain else None


def complaint(key: str) -> str:
    """Why this key is not read."""
    tool = _tool(key)
    if tool is None:
        return "is no LoRA weight of a linear layer"
    return f"is written as {tool} does, which is not read here: convert it to PEFT's format first"


def _tool(key: str) -> str | None:
    return next((tool for pattern, tool in _TOOLS.items() if re.fullmatch(pattern, key)), None)
