"""AdapterBank: many adapters of one layer in shared memory, changed while other threads run."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from .adapter_table import AdapterTable
from .chunks import Chunks, Range
from .ops.checks import FLOATING, check_number, check_tensor
from .ops.multi_lora_linear import COLUMNS, FREE

# Elements of a chunk, unless an adapter is larger.
_CHUNK = 1 << 22
_PAD = 16


def _padded(n: int) -> int:
    return -(-n // _PAD) * _PAD


class _Slots:
    """Which ids the slots of a bank answer to. Banks of one size that were changed alike have the same object."""

    __slots__ = ("__weakref__", "_next")

    def __init__(self):
        self._next: WeakValueDictionary[tuple[int, int], _Slots] = WeakValueDictionary()

    def changed(self, slot: int, number: int) -> _Slots:
        following = self._next.get((slot, number))
        if following is None:
            following = self._next[slot, number] = _Slots()
        return following


_empty: dict[int, _Slots] = {}  # max_adapters -> of a bank without adapters


class AdapterBank:
    """Adapters of a (out_features, in_features) layer, for inference with ``multi_lora_linear`` and ``sgmv``.

    A bank copies what it is given. A (R, K) and B^T (R, N) lie in chunks that are never moved; an adapter costs its own
    rank, rows padded to 16 columns. ``add``, ``remove`` and ``replace`` may be called while other threads run: a call
    sees the state of the moment it started, whole. Memory of a removed adapter is used again when no call that started
    before can read it.

    An id names one adapter for ever: a slot that is used again gets another generation, and an id of the old one is
    refused. On a GPU, changes take place in the order of the calling thread's current stream.

    Args:
        in_features, out_features: K and N.
        max_adapters: how many at a time. max_rank: the largest rank, >= 1.
        dtype: of the weights (default: torch's default dtype). device: default CPU.

    Raises:
        ValueError, TypeError: sizes or a dtype that make no sense.
    """

    def __init__(
        self, in_features: int, out_features: int, *, max_adapters: int, max_rank: int,
        dtype: torch.dtype | None = None, device: torch.device | str | None = None,
    ):  # fmt: skip
        for name, value in dict(
            in_features=in_features, out_features=out_features, max_adapters=max_adapters, max_rank=max_rank
        ).items():
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an int, got {type(value).__name__}")
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        dtype = torch.get_default_dtype() if dtype is None else dtype
        if dtype not in FLOATING:
            raise TypeError(f"dtype must be a floating point dtype, got {dtype}")
        self.in_features, self.out_features = in_features, out_features
        self.max_adapters, self.max_rank = max_adapters, max_rank
        self.dtype, self.device = dtype, torch.empty(0, device=device or "cpu").device
        self._lock = threading.RLock()
        most = max_adapters * max_rank * (_padded(in_features) + _padded(out_features))
        self._chunks = Chunks(min(_CHUNK, most), dtype, self.device)
        self._slots = 1 << (max_adapters - 1).bit_length()
        self._generations = (2**31 - 1) // self._slots
        self._generation = [0] * max_adapters
        self._unused = list(range(max_adapters - 1, -1, -1))
        self._ids: dict[str, int] = {}
        self._ranges: dict[int, tuple[Range, int]] = {}  # slot -> memory and rank
        with torch.inference_mode(False):
            table = torch.zeros((max_adapters, len(COLUMNS)), dtype=torch.int64, device=self.device)
            table[:, 0] = FREE
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            scaling = torch.zeros(max_adapters, dtype=wide, device=self.device)
        self._answers = _empty.setdefault(max_adapters, _Slots())
        self._state = self._snapshot(table, scaling)

    def add(self, name: str, lora_A: Tensor, lora_B: Tensor, scaling: float = 1.0) -> int:
        """Copy an adapter in, and return its id. lora_A (R, K), lora_B (N, R), 1 <= R <= max_rank, any dtype.

        Raises ValueError for a name that is there, or shapes that do not fit; RuntimeError if the bank is full.
        """
        self._check(name, lora_A, lora_B, scaling)
        with self._lock:
            if name in self._ids:
                raise ValueError(f"adapter {name!r} is in the bank already: replace() changes it")
            if not self._unused:
                raise RuntimeError(f"the bank is full: {len(self._ids)} of {self.max_adapters} adapters")
            slot = self._unused.pop()
            number = self._generation[slot] * self._slots + slot
            self._write(slot, number, lora_A, lora_B, scaling)
            self._ids[name] = number
            return number

    def replace(self, name: str, lora_A: Tensor, lora_B: Tensor, scaling: float = 1.0) -> None:
        """Exchange an adapter's weights and scaling; its rank may change, its id does not. KeyError if not there."""
        self._check(name, lora_A, lora_B, scaling)
        with self._lock:
            number = self._number(name)
            self._write(number % self._slots, number, lora_A, lora_B, scaling)

    def remove(self, name: str) -> None:
        """Take an adapter out; its id is refused from now on. KeyError if not there."""
        with self._lock:
            slot = self._number(name) % self._slots
            del self._ids[name]
            old, _ = self._ranges.pop(slot)
            self._change(slot, [FREE] + [0] * (len(COLUMNS) - 1), 0.0, [old])
            self._generation[slot] += 1
            # The last generation of a slot is its end: a number that comes back could be mistaken for an old one.
            if self._generation[slot] < self._generations:
                self._unused.append(slot)

    def ids(self, names: Iterable[str | None]) -> Tensor:
        """int32 ids of ``names`` on the bank's device; None gives -1 (base only). KeyError for an unknown name."""
        with self._lock:
            numbers = [-1 if name is None else self._number(name) for name in names]
        return torch.tensor(numbers, dtype=torch.int32, device=self.device)

    @property
    def names(self) -> list[str]:
        """Names of the adapters, oldest first."""
        with self._lock:
            return list(self._ids)

    def __contains__(self, name: object) -> bool:
        return name in self._ids

    def __len__(self) -> int:
        return len(self._ids)

    def __repr__(self) -> str:
        size = f"{self.in_features}, {self.out_features}, {len(self)} of {self.max_adapters} adapters"
        return f"AdapterBank({size}, {self.nbytes / 2**20:.1f} MiB)"

    @property
    def nbytes(self) -> int:
        """Bytes of all chunks, free ranges included."""
        return self._chunks.allocated * self._element_size

    @property
    def _element_size(self) -> int:
        return torch.empty(0, dtype=self.dtype).element_size()

    def snapshot(self) -> AdapterTable:
        """The state for one call. Memory that it shows stays as it is while it is held."""
        return self._state

    def _number(self, name: str) -> int:
        try:
            return self._ids[name]
        except KeyError:
            raise KeyError(f"no adapter {name!r} in the bank") from None

    def _check(self, name, A, B, scaling) -> None:
        if not isinstance(name, str):
            raise TypeError(f"name must be a string, got {type(name).__name__}")
        check_tensor("lora_A", A)
        check_tensor("lora_B", B)
        if A.dim() != 2 or A.shape[1] != self.in_features:
            raise ValueError(f"lora_A has shape {tuple(A.shape)}, expected (R, K) with K = {self.in_features}")
        if not 1 <= A.shape[0] <= self.max_rank:
            raise ValueError(f"lora_A has rank {A.shape[0]}, expected 1 to {self.max_rank}")
        if tuple(B.shape) != (self.out_features, A.shape[0]):
            raise ValueError(f"lora_B has shape {tuple(B.shape)}, expected {(self.out_features, A.shape[0])}")
        check_number("scaling", scaling)

    def _write(self, slot: int, number: int, A: Tensor, B: Tensor, scaling: float) -> None:
        R, columns_A, columns_B = A.shape[0], _padded(self.in_features), _padded(self.out_features)
        new = self._chunks.take(R * (columns_A + columns_B))
        with torch.inference_mode(False), torch.no_grad():
            # data: a write here is no change to calls that wait for their backward, which read other ranges.
            memory = self._chunks.tensors[new.chunk].data[new.offset : new.offset + R * (columns_A + columns_B)]
            for part, source, columns in (
                (memory[: R * columns_A], A, columns_A),
                (memory[R * columns_A :], B.t(), columns_B),
            ):
                rows = part.view(R, columns)
                rows[:, : source.shape[1]].copy_(source.detach())
                rows[:, source.shape[1] :].zero_()
        row = [number, R, new.chunk, new.offset, columns_A, new.chunk, new.offset + R * columns_A, 1, columns_B, 1]
        old = self._ranges.get(slot)
        self._ranges[slot] = new, R
        self._change(slot, row, float(scaling), [old[0]] if old else [])

    def _change(self, slot: int, row: Sequence[int], scaling: float, freed: list[Range]) -> None:
        before = self._state
        with torch.inference_mode(False):
            table, scalings = before.table, before.scaling
            if self.device.type == "cpu":
                table, scalings = table.clone(), scalings.clone()
            # On a GPU both stay where they are: captured graphs read them.
            table[slot] = torch.tensor(row, dtype=torch.int64)
            scalings[slot] = scaling
        self._answers = self._answers.changed(slot, row[0])
        self._state = self._snapshot(table, scalings)
        # Nothing freed is an entry too: ranges that later changes free may be seen by this snapshot.
        self._chunks.retire(freed, before, self._idle)

    def _idle(self) -> bool:
        # Before memory is used again, not when it is given up: kernels of any stream, and replayed graphs, may still
        # read it. Only add and replace ever wait for this.
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return True

    def _snapshot(self, table: Tensor, scaling: Tensor) -> AdapterTable:
        rank = self.max_rank if self.device.type == "cuda" else max((r for _, r in self._ranges.values()), default=1)
        return AdapterTable(
            self._chunks.tensors, table, scaling, self._slots - 1, rank, self.in_features, self.out_features,
            self._answers,
        )  # fmt: skip
