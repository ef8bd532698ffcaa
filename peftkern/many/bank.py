"""AdapterBank: many adapters of one layer in shared memory, changed while other threads run.

A call sees the state of the moment it started, whole, though a change copies nothing of the bank's size:

1. A call holds a *state*, an AdapterTable, which is not changed as long as its tensor ``table`` lives. States share the
   storage, but each has a tensor of its own, held by whoever reads the state: a call, also a compiled one, and a graph
   that waits for its backward.
2. A change first takes the state out of the bank. If the state's tensor dies of that, nobody holds the state, and nobody
   can get hold of it: the row is written in place. Otherwise table and scaling are copied, and the copies are written,
   the originals never again; so of the states that share a storage only the last can be held. Then the bank gets its
   next state; a call that finds none waits for the lock. A change is O(1), plus at most one copy for each call that
   runs beside it, and making that call's route costs as much.
3. An adapter's weights are written to memory that no state shows, without the lock. Memory that the next state does not
   show is used again when all states are gone that do (``Chunks.retire``).

On a GPU table and scaling stay where they are, since captured graphs read them: rows are always written in place, in the
order of the stream, and memory is used again when the device has done all that was started before.
"""

from __future__ import annotations

import hashlib
import os
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import FLOATING, check_number, check_tensor
from ..ops.multi_lora_linear import COLUMNS, FREE
from .chunks import Chunks, Range
from .rows import Rows
from .table import AdapterTable

# Ids are below it: int32.
IDS = 2**31 - 1
_PAD = 16
_SECRET = os.urandom(16)


def _padded(n: int) -> int:
    return -(-n // _PAD) * _PAD


def _token(number: int) -> int:
    # 128 bits of each id, so that the exclusive or of those in a bank tells which they are, in whatever order they came.
    return int.from_bytes(hashlib.blake2b(number.to_bytes(4, "little"), digest_size=16, key=_SECRET).digest(), "little")


class _Adapter(NamedTuple):
    number: int
    rank: int
    memory: Range


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
        self._width = _padded(in_features) + _padded(out_features)  # elements per rank
        self._chunks = Chunks(max_adapters * max_rank * self._width, dtype, self.device, self._wait)
        self._slots = 1 << (max_adapters - 1).bit_length()
        self._generations = IDS // self._slots
        self._generation = [0] * max_adapters
        self._unused = list(range(max_adapters - 1, -1, -1))
        self._adapters: dict[str, _Adapter] = {}
        self._ranks: Counter[int] = Counter()
        self._present = 0  # the tokens of all ids
        self._shown = Rows(max_adapters, dtype, self.device)
        self._state: AdapterTable | None = self._snapshot()

    def add(self, name: str, lora_A: Tensor, lora_B: Tensor, scaling: float = 1.0) -> int:
        """Copy an adapter in, and return its id. lora_A (R, K), lora_B (N, R), 1 <= R <= max_rank, any dtype.

        Raises ValueError for a name that is there, or shapes that do not fit; RuntimeError if the bank is full.
        """
        self._check(name, lora_A, lora_B, scaling)

        def number() -> int:
            if name in self._adapters:
                raise ValueError(f"adapter {name!r} is in the bank already: replace() changes it")
            if not self._unused:
                raise RuntimeError(f"the bank is full: {len(self._adapters)} of {self.max_adapters} adapters")
            return self._generation[self._unused[-1]] * self._slots + self._unused[-1]

        return self._store(name, lora_A, lora_B, scaling, number)

    def replace(self, name: str, lora_A: Tensor, lora_B: Tensor, scaling: float = 1.0) -> None:
        """Exchange an adapter's weights and scaling; its rank may change, its id does not. KeyError if not there."""
        self._check(name, lora_A, lora_B, scaling)
        self._store(name, lora_A, lora_B, scaling, lambda: self._find(name).number)

    def remove(self, name: str) -> None:
        """Take an adapter out; its id is refused from now on. KeyError if not there."""
        with self._lock:
            slot = self._find(name).number % self._slots
            self._change(name, None)
            self._generation[slot] += 1
            # The last generation of a slot is its end: a number that comes back could be mistaken for an old one.
            if self._generation[slot] < self._generations:
                self._unused.append(slot)

    def reserve(self, ranks: Iterable[int]) -> None:
        """Have free memory in one piece for adapters of these ranks, to be added later.

        A bank without room grows by a chunk, which CUDA graphs captured before do not know. They serve adapters that
        lie in memory that was reserved before. Raises ValueError for a rank that is not in 1 to max_rank.
        """
        ranks = list(ranks)
        for rank in ranks:
            if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= self.max_rank:
                raise ValueError(f"ranks must be of 1 to {self.max_rank}, got {rank!r}")
        with self._lock:
            self._chunks.reserve(sum(ranks) * self._width)
            self._advance(lambda: None)

    def ids(self, names: Iterable[str | None]) -> Tensor:
        """int32 ids of ``names`` on the bank's device; None gives -1 (base only). KeyError for an unknown name."""
        with self._lock:
            numbers = [-1 if name is None else self._find(name).number for name in names]
        return torch.tensor(numbers, dtype=torch.int32, device=self.device)

    @property
    def names(self) -> list[str]:
        """Names of the adapters, oldest first."""
        with self._lock:
            return list(self._adapters)

    def __contains__(self, name: object) -> bool:
        return name in self._adapters

    def __len__(self) -> int:
        return len(self._adapters)

    def __repr__(self) -> str:
        size = f"{self.in_features}, {self.out_features}, {len(self)} of {self.max_adapters} adapters"
        return f"AdapterBank({size}, {self.nbytes / 2**20:.1f} MiB)"

    @property
    def nbytes(self) -> int:
        """Bytes of all chunks, free ranges included."""
        return self._chunks.allocated * self.dtype.itemsize

    def snapshot(self) -> AdapterTable:
        """The state for one call. Memory that it shows stays as it is while it is held."""
        state = self._state
        if state is None:  # a change is being written
            with self._lock:
                state = self._state
        return state

    def _find(self, name: str) -> _Adapter:
        try:
            return self._adapters[name]
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

    def _store(self, name: str, A: Tensor, B: Tensor, scaling: float, number: Callable[[], int]) -> int:
        """Make these the weights of adapter ``name``. ``number`` gives its id or raises, under the lock."""
        with self._lock:
            number()  # raises before the work
            memory = self._chunks.take(A.shape[0] * self._width)
        known = False
        try:
            self._copy(A, B, memory)  # without the lock: it may take long, and nobody knows this memory yet
            with self._lock:
                adapter = _Adapter(number(), A.shape[0], memory)
                known = True
                self._change(name, adapter, float(scaling))
        finally:
            if not known:
                with self._lock:
                    self._chunks.retire([memory], weakref.ref(self._state.table))
        return adapter.number

    def _copy(self, A: Tensor, B: Tensor, memory: Range) -> None:
        with torch.inference_mode(False):
            # data: a write here is no change to calls that wait for their backward, which read other ranges.
            chunk, at = self._chunks.tensors[memory.chunk].data, memory.offset
            for source in (A.detach(), B.detach().t()):
                rank, width = source.shape
                rows = chunk.as_strided((rank, _padded(width)), (_padded(width), 1), at)
                at += rows.numel()
                if rows.shape[1] > width:
                    rows[:, width:] = 0.0
                    rows = rows[:, :width]
                rows.copy_(source)

    def _change(self, name: str, adapter: _Adapter | None, scaling: float = 0.0) -> None:
        """Put ``adapter`` (None: nothing) in the place of what goes by that name, if anything does."""
        old = self._adapters.get(name)
        slot = (adapter or old).number % self._slots
        row = [FREE] + [0] * (len(COLUMNS) - 1) if adapter is None else self._row(adapter)

        def write() -> None:
            self._shown.write(slot, row, scaling)
            for one, count in (old, -1), (adapter, 1):
                if one is not None:
                    self._ranks[one.rank] += count
                    self._present ^= _token(one.number)
            if adapter is None:
                del self._adapters[name]
            else:
                self._adapters[name] = adapter
            if old is None:
                self._unused.pop()

        self._advance(write, [] if old is None else [old.memory])

    def _row(self, adapter: _Adapter) -> list[int]:
        number, rank, (chunk, at, _) = adapter
        columns_A, columns_B = _padded(self.in_features), _padded(self.out_features)
        return [number, rank, chunk, at, columns_A, chunk, at + rank * columns_A, 1, columns_B, 1]

    def _advance(self, write: Callable[[], None], freed: Sequence[Range] = ()) -> None:
        """The next state: what ``write`` makes of this one. ``freed`` is what it no longer shows."""
        seen = weakref.ref(self._state.table)
        self._state = None
        try:
            with torch.inference_mode(False):
                if seen() is not None and self.device.type == "cpu":
                    self._shown.leave()
                write()
        finally:
            self._state = self._snapshot()
        # Without memory to give back too: what later changes give back may be seen by whoever sees the state before.
        self._chunks.retire(freed, seen)

    def _wait(self) -> None:
        # Kernels of any stream, and replayed graphs, may still read memory that is to be used again.
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _snapshot(self) -> AdapterTable:
        rank = self.max_rank if self.device.type == "cuda" else max((r for r, n in self._ranks.items() if n), default=1)
        return AdapterTable(
            self._chunks.tensors, self._shown.table.detach(), self._shown.scaling, self._slots - 1, rank, self.in_features,
            self.out_features, (self.max_adapters, self._present), True,
        )  # fmt: skip
