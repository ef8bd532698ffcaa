"""Tensors of an adapter's file, safetensors or pickle: the header once, the values when they are asked for."""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

SAFETENSORS, PICKLE = "adapter_model.safetensors", "adapter_model.bin"
DIFFUSERS = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin")
# Every value of an 8-bit float is a bf16 number.
_FP8 = {
    getattr(torch, name): torch.bfloat16
    for name in ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")
}
_CODES = {
    "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_FLOATS = {dtype: _FP8.get(dtype, dtype) for dtype in [*_CODES.values(), *_FP8]}


def refuse(file: Path, key: str, reason: str) -> ValueError:
    """The error for a key of a file that does not fit."""
    return ValueError(f"{file}: {key}: {reason}")


class Stored(NamedTuple):
    """What the header says of a tensor. dtype: in which it is read, None for one that holds no floats."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None
    stored: str


class Weights:
    """The file of weights in a folder: the first of ``names`` that is there.

    8-bit floats are read as bf16, which has all their values. A pickle is loaded with ``weights_only``: it may hold
    tensors and nothing that could run.

    Attributes:
        file: its path. header: key -> Stored. metadata: texts that safetensors keeps beside the tensors.

    Raises:
        ValueError: a file that is missing, unreadable, corrupt, truncated, or a pickle of other things than tensors.
    """

    def __init__(self, folder: Path, names: tuple[str, ...] = (SAFETENSORS, PICKLE)):
        self.file = next((folder / name for name in names if (folder / name).exists()), folder / names[0])
        self._pickled = self.file.suffix == ".bin"
        with self._open() as opened:
            self.metadata: dict[str, str] = {} if self._pickled else dict(opened.metadata() or {})
            self.header = {key: self._stored(opened, key) for key in list(opened.keys())}

    def read(self, keys: Iterable[str]) -> Iterator[Tensor]:
        """The tensors of these keys, one after the other. Raises ValueError if the file was changed meanwhile."""
        with self._open() as opened:
            for key in keys:
                try:
                    tensor = opened[key] if self._pickled else opened.get_tensor(key)
                except (SafetensorError, OSError, KeyError) as error:
                    raise refuse(self.file, key, f"cannot be read ({error})") from None
                if tuple(tensor.shape) != self.header[key].shape:
                    raise refuse(self.file, key, "was changed while it was read")
                yield tensor.to(_FLOATS.get(tensor.dtype, tensor.dtype))

    def _open(self):
        # A pickle is loaded whole, each time: it is not kept, as there may be thousands of adapters.
        if self._pickled:
            return nullcontext(self._unpickle())
        try:
            return safe_open(self.file, framework="pt", device="cpu")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{self.file}: cannot be read as safetensors ({error})") from None

    def _stored(self, opened, key: str) -> Stored:
        if self._pickled:
            tensor = opened[key]
            return Stored(tuple(tensor.shape), _FLOATS.get(tensor.dtype), str(tensor.dtype).removeprefix("torch."))
        view = opened.get_slice(key)
        return Stored(tuple(view.get_shape()), _FLOATS.get(_CODES.get(view.get_dtype())), view.get_dtype())

    def _unpickle(self) -> dict[str, Tensor]:
        try:
            tensors: Any = torch.load(self.file, map_location="cpu", weights_only=True)
        except Exception as error:  # torch.load has no error of its own: zip, pickle and storage each raise theirs
            if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error):
                reason = "is a pickle of more than tensors, which could run code, and is not loaded"
            else:
                reason = f"cannot be read as a pickle of tensors ({str(error).partition(chr(10))[0]})"
            raise ValueError(f"{self.file}: {reason}") from None
        if not isinstance(tensors, dict):
            raise ValueError(f"{self.file}: is a pickled {type(tensors).__name__}, expected tensors by name")
        for key, value in tensors.items():
            if not isinstance(key, str) or not isinstance(value, Tensor):
                raise refuse(self.file, str(key), f"is a {type(value).__name__}, expected a tensor")
        return tensors
