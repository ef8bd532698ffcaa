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
3. What an adapter is made of is written to memory that no state shows, without the lock. Memory that the next state does
   not show is used again when all states are gone that do (``Chunks.retire``). Matrices that several adapters share are
   counted, and count as shown for as long as one of them is there.

On a GPU table and scaling stay where they are, since captured graphs read them: rows are always written in place, in the
order of the stream, and memory is used again when the device has done all that was started before.
"""

from __future__ import annotations

import hashlib
import os
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Iterable

import torch
from torch import Tensor

from ..activations import CODES
from ..checks import FLOATING, check_number, check_tensor
from ..ops.adapter_table import AXES, COLUMNS, FREE, PHI, table_row
from .adapter import ARGUMENTS, Adapter, vectors_of
from .chunks import Chunks, Range
from .rows import Rows
from .stored import Matrices, Stored
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


class AdapterBank:
    """Adapters of a (out_features, in_features) layer, for inference with ``multi_lora_linear`` and ``sgmv``.

    A bank copies what it is given. A (R, K) and B^T (R, N) lie in chunks that are never moved; an adapter costs its own
    rank, rows padded to 16 columns, and its vectors in fp32. ``add``, ``remove`` and ``replace`` may be called while other
    threads run: a call sees the state of the moment it started, whole. Memory of a removed adapter is used again when no
    call that started before can read it.

    Matrices that several adapters share, as VeRA's do, are stored once. The bank knows them by their memory (address,
    shape, strides, dtype) and compares what it is given with what it holds: matrices that were changed in place since get
    a copy of their own, and the adapters that were there before keep theirs.

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
        self._wide = torch.float64 if dtype == torch.float64 else torch.float32
        most = sum(_padded(size) for size in self._sizes(max_rank).values())
        self._vectors = Chunks(max_adapters * most, self._wide, self.device, self._wait)
        self._slots = 1 << (max_adapters - 1).bit_length()
        self._generations = IDS // self._slots
        self._generation = [0] * max_adapters
        self._unused = list(range(max_adapters - 1, -1, -1))
        self._adapters: dict[str, Stored] = {}
        self.pairs: dict[Hashable, Matrices] = {}  # by what they were copied from
        self._ranks: Counter[int] = Counter()
        self._symbols: Counter[str] = Counter()  # of vectors
        self._captured: set[str] = set()  # what acted in the states that CUDA graphs have captured
        self._present = 0  # the tokens of all ids
        self._rows = Rows(max_adapters, dtype, self.device)
        self._state: AdapterTable | None = self._snapshot()

    def add(
        self, name: str, lora_A: Tensor | None = None, lora_B: Tensor | None = None, scaling: float = 1.0, *,
        bias: Tensor | None = None, **coefficients: Tensor | None,
    ) -> int:  # fmt: skip
        """Copy an adapter in, and return its id. lora_A (R, K), lora_B (N, R), 1 <= R <= max_rank, any dtype; or neither.

        ``coefficients``, ``bias``, rank_bias and activation as in ``Adapter``. Raises ValueError for a name that is there, or
        shapes that do not fit; RuntimeError if the bank is full, or for what CUDA graphs which were captured before leave
        out.
        """
        adapter = Adapter(lora_A, lora_B, scaling, bias=bias, **coefficients)

        def number() -> int:
            if name in self._adapters:
                raise ValueError(f"adapter {name!r} is in the bank already: replace() changes it")
            if not self._unused:
                raise RuntimeError(f"the bank is full: {len(self._adapters)} of {self.max_adapters} adapters")
            return self._generation[self._unused[-1]] * self._slots + self._unused[-1]

        return self._store(name, adapter, number)

    def replace(
        self, name: str, lora_A: Tensor | None = None, lora_B: Tensor | None = None, scaling: float = 1.0, *,
        bias: Tensor | None = None, **coefficients: Tensor | None,
    ) -> None:  # fmt: skip
        """Exchange all of an adapter; its rank may change, its id does not. KeyError if not there, else as ``add``."""
        adapter = Adapter(lora_A, lora_B, scaling, bias=bias, **coefficients)
        self._store(name, adapter, lambda: self._find(name).number)

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

    def __reduce__(self) -> tuple:
        """A pickle or copy: the adapters, as tensors of their own, and their ids. What is made of it has memory of its own."""
        sizes = self.in_features, self.out_features, self.max_adapters, self.max_rank
        with self._lock, torch.inference_mode(False), torch.no_grad():
            adapters = self._adapters
            copies = {id(m): [t.clone() for t in self._halves(m)] for m in (a.matrices for a in adapters.values()) if m}
            given = [
                (name, *copies.get(id(a.matrices), (None, None)), self._rows.scaling[a.number % self._slots].item(),
                 a.how, self._vectors_of(a))
                for name, a in adapters.items()
            ]  # fmt: skip
            # Slots are taken from the end: those of the adapters, in their order, before those that are free now.
            unused = [*self._unused, *(a.number % self._slots for a in reversed(adapters.values()))]
            like = self._rows.scaling.new_empty(0, dtype=self.dtype)
            return _made, (type(self), sizes, like, list(self._generation), unused, given)

    def __deepcopy__(self, memo: dict) -> AdapterBank:
        """A bank with memory of its own, in which the same ids name the same adapters."""
        make, args = self.__reduce__()
        made = memo[id(self)] = make(*args)
        return made

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
        return self._chunks.allocated * self.dtype.itemsize + self._vectors.allocated * self._wide.itemsize

    def snapshot(self) -> AdapterTable:
        """The state for one call. Memory that it shows stays as it is while it is held."""
        state = self._state
        if state is None:  # a change is being written
            with self._lock:
                state = self._state
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            self._captured.add(state.acting)
        return state

    def _find(self, name: str) -> Stored:
        try:
            return self._adapters[name]
        except KeyError:
            raise KeyError(f"no adapter {name!r} in the bank") from None

    def _sizes(self, rank: int) -> dict[str, int]:
        axes = {"R": rank, "K": self.in_features, "N": self.out_features}
        return {symbol: axes[axis] for symbol, axis in AXES.items()}

    def _check(self, name, adapter: Adapter) -> dict[str, Tensor]:
        """The vectors by symbol of an adapter that fits the bank."""
        if not isinstance(name, str):
            raise TypeError(f"name must be a string, got {type(name).__name__}")
        A, B, rank = adapter.lora_A, adapter.lora_B, 0
        if A is not None:
            check_tensor("lora_A", A)
            check_tensor("lora_B", B)
            if A.dim() != 2 or A.shape[1] != self.in_features:
                raise ValueError(f"lora_A has shape {tuple(A.shape)}, expected (R, K) with K = {self.in_features}")
            rank = A.shape[0]
            if not 1 <= rank <= self.max_rank:
                raise ValueError(f"lora_A has rank {rank}, expected 1 to {self.max_rank}")
            if tuple(B.shape) != (self.out_features, rank):
                raise ValueError(f"lora_B has shape {tuple(B.shape)}, expected {(self.out_features, rank)}")
        check_number("scaling", adapter.scaling)
        sizes = {"R": rank, "K": self.in_features, "N": self.out_features}
        return vectors_of("", adapter, self._rows.scaling.new_empty(0), sizes, anywhere=True)

    def _store(self, name: str, adapter: Adapter, number: Callable[[], int]) -> int:
        """Make this the adapter ``name``. ``number`` gives its id or raises, under the lock."""
        vectors, activation = self._check(name, adapter), CODES[adapter.activation]
        phi = [PHI] * (activation > 0)
        for acting in self._captured:
            if unknown := [symbol for symbol in (*vectors, *phi) if symbol not in acting.split()]:
                raise RuntimeError(
                    f"a CUDA graph was captured when no adapter of the bank had {unknown[0]}, and would leave it out:"
                    " add one such adapter before the capture"
                )
        with self._lock:
            number()  # raises before the work
        # Copied without the lock: it may take long, and nobody knows this memory yet.
        matrices = self._held(adapter.lora_A, adapter.lora_B)
        room, offsets = None, {}
        try:
            if vectors:
                room, offsets = self._copy_vectors(vectors)
            with self._lock:
                beside = next((f"adapter {name!r} {what}" for what in adapter.beside()), None)
                stored = Stored(number(), matrices, room, offsets, beside, activation)
                matrices = room = None  # the bank's from here on
                self._change(name, stored, float(adapter.scaling))
        finally:
            if matrices is not None or room is not None:
                with self._lock:
                    self._retire(matrices, room, weakref.ref(self._state.table))
        return stored.number

    def _held(self, A: Tensor | None, B: Tensor | None) -> Matrices | None:
        """These matrices in memory of the bank, shared or copied, with one user more."""
        if A is None:
            return None
        key = tuple((t.device, t.data_ptr(), t.shape, t.stride(), t.dtype) for t in (A, B))
        with self._lock:
            known = self.pairs.get(key) if self.device.type != "meta" else None
            if known is not None:
                known.users += 1
        if known is not None:
            if all(torch.equal(ours, t.detach().to(ours)) for ours, t in zip(self._halves(known), (A, B.t()))):
                return known
            with self._lock:
                self._retire(known, None, weakref.ref(self._state.table))
        with self._lock:
            made = Matrices(key, A.shape[0], self._chunks.take(A.shape[0] * self._width))
        try:
            self._copy(A, B, made)
        except BaseException:
            with self._lock:
                self._retire(made, None, weakref.ref(self._state.table))
            raise
        with self._lock:
            self.pairs[key] = made
        return made

    def _retire(self, matrices: Matrices | None, vectors: Range | None, seen: weakref.ref) -> None:
        """One user of the matrices less, and nobody any more of the vectors. ``seen``: the last state that may show them."""
        freed = []
        if matrices is not None:
            matrices.users -= 1
            if matrices.users == 0:
                freed.append(matrices.memory)
                if self.pairs.get(matrices.key) is matrices:
                    del self.pairs[matrices.key]
        # Without memory to give back too: what is given back later may be seen by whoever sees this state.
        self._chunks.retire(freed, seen)
        self._vectors.retire([] if vectors is None else [vectors], seen)

    def _halves(self, stored: Matrices, padded: bool = False) -> list[Tensor]:
        """A and B^T where they are stored, with the columns of their padding or without."""
        # data: a write here is no change to calls that wait for their backward, which read other ranges.
        chunk, at, found = self._chunks.tensors[stored.memory.chunk].data, stored.memory.offset, []
        for width in (self.in_features, self.out_features):
            rows = chunk.as_strided((stored.rank, _padded(width)), (_padded(width), 1), at)
            at += rows.numel()
            found.append(rows if padded else rows[:, :width])
        return found

    def _copy(self, A: Tensor, B: Tensor, into: Matrices) -> None:
        with torch.inference_mode(False):
            for source, rows in zip((A.detach(), B.detach().t()), self._halves(into, padded=True), strict=True):
                width = source.shape[1]
                rows[:, width:] = 0.0
                rows[:, :width].copy_(source)

    def _vectors_of(self, adapter: Stored) -> dict[str, Tensor]:
        """Copies of an adapter's vectors by the name of their argument."""
        sizes, found = self._sizes(adapter.rank), {}
        for symbol, at in adapter.offsets.items():
            chunk = self._vectors.tensors[adapter.vectors.chunk].data
            found[ARGUMENTS[symbol]] = chunk[at : at + sizes[symbol]].clone()
        return found

    def _copy_vectors(self, vectors: dict[str, Tensor]) -> tuple[Range, dict[str, int]]:
        """Where they lie in memory of the bank: all of them, and by symbol in its chunk."""
        with self._lock:
            room = self._vectors.take(sum(_padded(v.numel()) for v in vectors.values()))
        chunk, at, offsets = self._vectors.tensors[room.chunk].data, room.offset, {}
        with torch.inference_mode(False):
            for symbol, vector in vectors.items():
                chunk[at : at + vector.numel()].copy_(vector.detach())
                offsets[symbol] = at
                at += _padded(vector.numel())
        return room, offsets

    def _change(self, name: str, adapter: Stored | None, scaling: float = 0.0) -> None:
        """Put ``adapter`` (None: nothing) in the place of what goes by that name, if anything does."""
        old = self._adapters.get(name)
        slot = (adapter or old).number % self._slots
        row = [FREE] + [0] * (len(COLUMNS) - 1) if adapter is None else self._row(adapter)

        def write() -> None:
            self._rows.write(slot, row, scaling)
            for one, count in (old, -1), (adapter, 1):
                if one is not None:
                    self._ranks[one.rank] += count
                    for symbol in one.symbols:
                        self._symbols[symbol] += count
                    self._present ^= _token(one.number)
            if adapter is None:
                del self._adapters[name]
            else:
                self._adapters[name] = adapter
            if old is None:
                self._unused.pop()

        self._advance(write, old)

    def _row(self, adapter: Stored) -> list[int]:
        vectors = {symbol: (adapter.vectors.chunk, at) for symbol, at in adapter.offsets.items()}
        if adapter.matrices is None:
            return table_row(adapter.number, 0, 0, 0, 0, 0, 0, 0, 0, 1, **vectors)
        rank, (chunk, at, _) = adapter.rank, adapter.matrices.memory
        columns_A, columns_B = _padded(self.in_features), _padded(self.out_features)
        matrices = adapter.number, rank, chunk, at, columns_A, chunk, at + rank * columns_A, 1, columns_B, 1
        return table_row(*matrices, activation=adapter.activation, **vectors)

    def _advance(self, write: Callable[[], None], old: Stored | None = None) -> None:
        """The next state: what ``write`` makes of this one, which no longer shows ``old``."""
        seen = weakref.ref(self._state.table)
        self._state = None
        try:
            with torch.inference_mode(False):
                if seen() is not None and self.device.type == "cpu":
                    self._rows.leave()
                write()
        finally:
            self._state = self._snapshot()
        self._retire(*((None, None) if old is None else (old.matrices, old.vectors)), seen)

    def _wait(self) -> None:
        # Kernels of any stream, and replayed graphs, may still read memory that is to be used again.
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _snapshot(self) -> AdapterTable:
        rank = self.max_rank if self.device.type == "cuda" else max((r for r, n in self._ranks.items() if n), default=1)
        acting = " ".join(symbol for symbol in (*AXES, PHI) if self._symbols[symbol])
        return AdapterTable(
            self._chunks.tensors, self._rows.table.detach(), self._rows.scaling, self._slots - 1, rank, self.in_features,
            self.out_features, (self.max_adapters, self._present), True, self._vectors.tensors if acting else (), acting,
            beside=next((a.beside for a in self._adapters.values() if a.beside), None) if acting else None,
        )  # fmt: skip


def _made(
    cls: type, sizes: tuple, like: Tensor, generation: list[int], unused: list[int], adapters: list
) -> AdapterBank:
    """The bank of a pickle, in the dtype and on the device of ``like``, which ``torch.load`` may have moved."""
    K, N, most, rank = sizes
    bank = cls(K, N, max_adapters=most, max_rank=rank, dtype=like.dtype, device=like.device)
    bank._generation, bank._unused = generation, unused
    for name, A, B, scaling, activation, vectors in adapters:
        bank.add(name, A, None if B is None else B.t(), scaling, activation=activation, **vectors)
    return bank
