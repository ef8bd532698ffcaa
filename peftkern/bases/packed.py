"""What kinds of packed codes have in common: checks of the parts, nibbles, and scales that act on blocks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..checks import check_tensor

SCALES = (torch.float32, torch.bfloat16, torch.float16)


class Packed:
    """Base of the kinds that hold codes: their dtype is not the activation's, so autocast leaves them alone.

    ``parts``: the forms of the kind, each a tuple of its tensors' names and dtypes. ``sized``: whether the tensors tell (N, K)
    by themselves.
    """

    name: str
    parts: Sequence[dict[str, tuple[torch.dtype, ...]]]
    sized = True

    def cast(self, tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
        """The tensors as they are."""
        return list(tensors)

    def named(self, tensors: Sequence[Tensor], like: Tensor) -> dict[str, Tensor]:
        """The tensors by name, if their number, dtypes and device are right; else TypeError or ValueError."""
        form = next((form for form in self.parts if len(form) == len(tensors)), None)
        if form is None:
            expected = " or ".join(f"{len(form)} ({', '.join(form)})" for form in self.parts)
            raise ValueError(f"base has {len(tensors)} tensors, expected {expected} for {self.name}")
        for (part, dtypes), t in zip(form.items(), tensors, strict=True):
            check_tensor(self.called(part), t, dtypes=dtypes)
            if t.device != like.device:
                raise ValueError(f"{self.called(part)} is on {t.device}, expected {like.device}")
        return dict(zip(form, tensors, strict=True))

    def called(self, part: str) -> str:
        """A part's name in messages."""
        return f"{self.name} {part}"

    def shaped(self, part: str, t: Tensor, shape: tuple[int, ...], meaning: str) -> None:
        """Raise ValueError for a part of another shape."""
        if t.shape != shape:
            raise ValueError(f"{self.called(part)} has shape {tuple(t.shape)}, expected {meaning} = {tuple(shape)}")

    def bytes(self, part: str, t: Tensor, count: int, meaning: str) -> None:
        """Raise ValueError for a part that is not contiguous or has another number of elements, of whatever shape."""
        if not t.is_contiguous():
            raise ValueError(f"{self.called(part)} has strides {t.stride()}, expected contiguous")
        if t.numel() != count:
            raise ValueError(f"{self.called(part)} has {t.numel()} elements, expected {meaning} = {count}")

    def matrix(self, part: str, t: Tensor, K: int | None, N: int | None, packs: int = 1) -> tuple[int, int]:
        """(N, K) of codes (N, K / packs); ValueError where they are not such, or not the N and K that are known."""
        form = "(N, K)" if packs == 1 else f"(N, K / {packs})"
        if t.dim() != 2:
            raise ValueError(f"{self.called(part)} has shape {tuple(t.shape)}, expected {form}")
        shape = (t.shape[0] if N is None else N, t.shape[1] * packs if K is None else K)
        if shape[1] % packs:
            raise ValueError(f"a base of kind {self.name} has an even number of in_features, got K = {shape[1]}")
        self.shaped(part, t, (shape[0], shape[1] // packs), form)
        return shape


def known(kind: str, elements: int, K: int | None, N: int | None) -> tuple[int, int]:
    """(N, K) of a kind whose codes have no shape: N, where it is not known, from the number of elements."""
    if K is None:
        raise ValueError(f"a base of kind {kind} has no in_features of its own, and nothing else tells them")
    return (elements // max(K, 1) if N is None else N), K


def block_length(elements: int, blocks: int) -> int:
    """The power of two b with ceil(elements / b) = blocks, of which there is one where there are two blocks or more.

    For one block, the least that holds all; 0 if there is none.
    """
    b = 1
    while -(-elements // b) > blocks and b < elements:
        b *= 2
    return b if -(-elements // b) == blocks else 0


def by_blocks(values: Tensor, scales: Tensor, length: int) -> Tensor:
    """values (n), each times the scale of its block of that length: flat, the last may be shorter."""
    return values * scales.repeat_interleave(length)[: values.numel()]


def nibbles(codes: Tensor, *, high_first: bool) -> Tensor:
    """The two codes of each byte beside each other: (..., B) -> (..., 2 B), uint8."""
    high, low = codes >> 4, codes & 15
    return torch.stack((high, low) if high_first else (low, high), dim=-1).flatten(-2)
