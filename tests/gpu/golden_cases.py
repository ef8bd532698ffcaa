"""Every wrapped instruction with fixed operands, and what the simulator makes of them: the golden vectors.

The launchers are those of tests/sim/kernels, built for the simulator or by nvcc. Operands are a plain function of their
position, small integers wherever sums are formed, so that results are exact and no rounding can differ. The vectors in
golden/, a file for each launcher, were computed by the simulator; tests/sim/instructions/test_golden.py holds it to them, and
tests/gpu/test_instructions.py the GPU.

    python tests/gpu/golden_cases.py --write        after a change of a launcher or a case
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

HERE = Path(__file__).resolve().parent
FOLDER = HERE / "golden"
# Launchers without a golden vector, and why.
LEFT_OUT = {
    "sim_diverged": "a wrong use, which only the simulator reports",
    "sim_gemm_sm80": "compared with numpy's product",
    "sim_gemm_sm90": "compared with numpy's product",
}


@dataclass(frozen=True)
class In:
    """An operand that kernels read; ``output``: and change, so that it is a result too."""

    array: np.ndarray
    output: bool = False


@dataclass(frozen=True)
class Out:
    """A result."""

    shape: tuple[int, ...]
    dtype: type


class Runner(Protocol):
    """Device memory and launches, of the simulator or of a GPU."""

    def put(self, array: np.ndarray): ...
    def empty(self, shape: tuple[int, ...], dtype): ...
    def get(self, buffer) -> np.ndarray: ...
    def launch(self, name: str, arguments: list) -> None: ...


@dataclass(frozen=True)
class Case:
    """``arguments`` of the launcher: In, Out, int, None, or a ctypes value. ``canonical`` makes results comparable."""

    name: str
    launcher: str
    arguments: tuple
    arch: int = 80
    canonical: Callable[[list[np.ndarray]], list[np.ndarray]] = lambda results: results

    def run(self, runner: Runner) -> list[np.ndarray]:
        """The results, in the order of the arguments."""
        values, results = [], []
        for a in self.arguments:
            buffer = runner.put(a.array) if isinstance(a, In) else None
            buffer = runner.empty(a.shape, a.dtype) if isinstance(a, Out) else buffer
            if isinstance(a, Out) or (isinstance(a, In) and a.output):
                results.append(buffer)
            values.append(a if buffer is None else buffer)
        runner.launch(self.launcher, values)
        return self.canonical([runner.get(b) for b in results])


def numbers(shape: tuple[int, ...], low: int, high: int, salt: int = 0) -> np.ndarray:
    """int64 from low to high, mixed from the position alone."""
    x = np.arange(1, int(np.prod(shape)) + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(salt << 40)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return (low + (x % np.uint64(high - low + 1)).astype(np.int64)).reshape(shape)


def halves(values: np.ndarray, is_f16: bool) -> np.ndarray:
    """Bits of small integers as fp16 or bf16, which hold them exactly."""
    floats = values.astype(np.float32)
    return floats.astype(np.float16).view(np.uint16) if is_f16 else (floats.view(np.uint32) >> 16).astype(np.uint16)


def words(shape: tuple[int, ...], limit: int, is_f16: bool, salt: int) -> np.ndarray:
    """uint32 registers, each of two halves from -limit to limit."""
    return halves(numbers((*shape, 2), -limit, limit, salt), is_f16).view(np.uint32)[..., 0]


def _one_nan(results: list[np.ndarray]) -> list[np.ndarray]:
    # A NaN has many patterns. Results of sim_convert: bf16, fp16, both as fp32, and pairs with 1.
    b, h, bf, hf, packed = (r.copy() for r in results)
    bad_b, bad_h = (b & 0x7FFF) > 0x7F80, (h & 0x7FFF) > 0x7C00
    b[bad_b], h[bad_h] = 0x7FFF, 0x7FFF
    packed[bad_b, 0], packed[bad_h, 1] = 0x3F807FFF, 0x7FFF3C00
    return [b, h, np.nan_to_num(bf, nan=12345.0), np.nan_to_num(hf, nan=12345.0), packed]


def _to_convert() -> np.ndarray:
    odd = numbers((900,), 0, 2**32 - 1, 1).astype(np.uint32).view(np.float32)
    near = numbers((600,), -(2**24), 2**24, 2).astype(np.float32) * np.float32(2.0) ** numbers((600,), -60, -5, 3)
    ties = np.arange(1, 400, dtype=np.float32) * np.float32(1 + 2.0**-11)
    edges = [65504, 65519.99, 65520, 1e-8, 2.0**-25, 1.5 * 2.0**-25, -(2.0**-24), np.inf, -np.inf, 0.0, -0.0, np.nan]
    return np.concatenate([odd, near.astype(np.float32), ties, np.float32(edges)]).astype(np.float32)


def _plain_cases() -> list[Case]:
    found = []
    for f16 in (0, 1):
        start = In(numbers((32, 4), -30, 30, 3).astype(np.float32), output=True)
        operands = In(words((32, 4), 8, bool(f16), 1)), In(words((32, 2), 8, bool(f16), 2))
        found.append(Case(f"mma-{('bf16', 'f16')[f16]}", "sim_mma", (f16, *operands, start)))
    rows = numbers((64, 8), 0, 65535, 4).astype(np.uint16)
    where = np.argsort(numbers((64,), 0, 2**40, 5), kind="stable")[:32].astype(np.int32)
    for count in (1, 2, 4):
        for transposed in (0, 1):
            args = count, transposed, In(rows), In(where), Out((32, count), np.uint32)
            found.append(Case(f"load_matrices-{count}-{transposed}", "sim_load_matrices", args))
    lanes = numbers((32,), 0, 2**31, 6).astype(np.uint32)
    for argument in (0, 1, 5, 16, 31):
        found.append(Case(f"warp-{argument}", "sim_warp", (In(lanes), argument, Out((32, 8), np.uint32))))
    values = _to_convert()
    n = len(values)
    outs = *(Out((n,), t) for t in (np.uint16, np.uint16, np.float32, np.float32)), Out((n, 2), np.uint32)
    found.append(Case("convert", "sim_convert", (In(values), n, *outs), canonical=_one_nan))
    for each in (4, 8, 16):
        for length in (37, 130):
            size, blocks = length * each - length % each, -(-length // 64)
            args = each, In(numbers((size,), 0, 255, 7).astype(np.uint8)), size, blocks
            found.append(Case(f"copy-{each}-{length}", "sim_copy", (*args, Out((blocks * 64 * each,), np.uint8))))
    # Which thread got which count is not determined.
    counters = In(np.zeros(3, np.uint32), output=True)
    found.append(
        Case(
            "atomics", "sim_atomics", (7, 37, counters, Out((7 * 37,), np.uint32)),
            canonical=lambda r: [r[0], np.sort(r[1])],
        )
    )  # fmt: skip
    found.append(Case("handover", "sim_handover", (9, Out((9, 32), np.uint32))))
    for each in (4, 16):
        source = In(numbers((32 * each,), 0, 255, 8).astype(np.uint8))
        found.append(Case(f"load_once-{each}", "sim_load_once", (each, source, Out((32 * each,), np.uint8))))
    parts = In(numbers((6, 64), -99, 99, 9).astype(np.float32))
    scratch = Out((6, 64), np.float32)
    counters = In(np.zeros(1, np.uint32), output=True)
    found.append(Case("last_arriver", "sim_last_arriver", (parts, 6, scratch, counters, Out((2, 64), np.float32), 0)))
    # Producers take their parts by ticket: what lies where in the scratch memory is not determined, the sums are.
    scratch, counters = In(np.zeros((6, 64), np.float32)), In(np.zeros(2, np.uint32), output=True)
    found.append(Case("tickets", "sim_tickets", (parts, 6, 4, scratch, counters, Out((4, 64), np.float32), 0)))
    values = In((numbers((500,), -(2**24), 2**24, 10) * 2.0 ** numbers((500,), -90, 60, 11)).astype(np.float32))
    for terms in (1, 2, 3):
        found.append(Case(f"split-{terms}", "sim_split", (terms, values, 500, Out((250, terms), np.uint32))))
    factors = numbers((400, 2), 0, 2**32 - 1, 12).astype(np.uint32)
    found.append(Case("multiply_wide", "sim_multiply_wide", (In(factors), 400, Out((400,), np.uint64))))
    finite = np.arange(1 << 16, dtype=np.uint16)
    finite = np.ascontiguousarray(finite[(finite & 0x7C00) != 0x7C00][::7][:8000])
    pairs = finite.view(np.uint32)
    found.append(Case("split_f16", "sim_split_f16", (In(pairs), len(pairs), Out((len(pairs), 2), np.uint32))))
    return found


class WgmmaCase(ctypes.Structure):
    """As in tests/sim/kernels/instructions_sm90.cu; given by address, read on the host."""

    _fields_ = [
        (name, ctypes.c_uint32) for name in ("a_offset", "b_offset", "stride_a", "leading_a", "stride_b", "leading_b")
    ] + [("accumulate", ctypes.c_int), ("fences", ctypes.c_int)]


def _wgmma_cases() -> list[Case]:
    found = []
    for n, columns_a, columns_b in ((16, 0, 0), (32, 1, 0), (64, 0, 1), (128, 1, 1), (256, 0, 0)):
        for f16, registers, step in ((0, 0, 0), (1, 0, 3), (0, 1, 2)):
            # Step along K: 32 bytes within a row, or two atoms of 8 rows.
            which = WgmmaCase(
                step * (2048 if columns_a else 32), 8192 + step * (2048 if columns_b else 32),
                1024, 64 * 128 if columns_a else 16, 1024, 64 * 128 if columns_b else 16, int(step > 0), 1,
            )  # fmt: skip
            image = In(words((48 * 256,), 2, bool(f16), 20 + n))
            a = In(words((128, 4), 2, bool(f16), 21)) if registers else None
            start = In(numbers((128, n // 2), -9, 9, 22).astype(np.float32), output=True)
            kind = f"{('bf16', 'f16')[f16]}-{('shared', 'registers')[registers]}-{step}"
            found.append(Case(f"wgmma-{n}-{kind}", "sim_wgmma", (f16, n, image, ctypes.byref(which), a, start), 90))
    return found


def _hopper_cases() -> list[Case]:
    found = _wgmma_cases()
    rows, columns, stride = 100, 107, 112
    matrix = In(np.arange(1, rows * stride + 1, dtype=np.uint16).reshape(rows, stride))
    for box, swizzle in (((64, 64), 1), ((24, 64), 1), ((16, 32), 0), ((128, 8), 0)):
        for row, column in ((8, 64), (-3, -5), (97, 100)):
            args = matrix, rows, columns, stride, *box, swizzle, row, column, Out(box, np.uint16)
            found.append(Case(f"tile-{box[0]}x{box[1]}-{swizzle}-{row}-{column}", "sim_tile", args, 90))
    found.append(Case("phases", "sim_phases", (9, Out((9, 32), np.uint32)), 90))
    between = In(np.zeros((8, 256), np.uint32))
    found.append(Case("cluster", "sim_cluster", (between, Out((8, 256), np.uint32)), 90))
    for size in (1, 2, 3, 8):
        args = size, 2, Out((2 * size, 64, 4 * size + 7), np.uint32), 0
        found.append(Case(f"exchange-{size}", "sim_exchange", args, 90))
        found.append(Case(f"push-{size}", "sim_push", (size, 2, Out((2 * size, size, 64, 7), np.uint32), 0), 90))
    word, start = Out((32,), np.uint32), numbers((64,), 0, 2**20, 31).astype(np.uint32)
    found.append(Case("double", "sim_double", (In(start), Out((64,), np.uint32), 64, 0), 90))
    found.append(Case("dependent", "sim_dependent", (In(start[:32]), In(start[32:]), word, word, word, 0), 90))
    found.append(Case("cluster-handover", "sim_cluster_handover", (2, Out((4, 32), np.uint32), 0), 90))
    for steps in (1, 2, 5):
        data = In(numbers((16 * steps, 64), 0, 999, 30).astype(np.uint16))
        found.append(Case(f"multicast-{steps}", "sim_multicast", (data, steps, 2, Out((4, 64), np.uint32), 0), 90))
    return found


CASES = _plain_cases() + _hopper_cases()


def smallest(array: np.ndarray) -> np.ndarray:
    """The same values as int16 where all are such integers: a quarter of the file."""
    flat = array.astype(np.float64)
    whole = np.all(flat == np.round(flat)) and np.all(np.abs(flat) < 2**15) and not np.signbit(flat[flat == 0]).any()
    return array.astype(np.int16) if array.dtype == np.float32 and whole else array


def expected() -> dict[str, list[np.ndarray]]:
    """The committed vectors: results by case."""
    found: dict[str, list[np.ndarray]] = {}
    for file in sorted(FOLDER.glob("*.npz")):
        with np.load(file) as data:
            for key in sorted(data.files):
                name, _, i = key.rpartition("/")
                assert len(found.setdefault(name, [])) == int(i)
                found[name].append(data[key])
    return found


def same(result: np.ndarray, golden: np.ndarray) -> bool:
    """Bit for bit, whatever type the vector is stored in."""
    return result.shape == golden.shape and np.array_equal(smallest(result), golden)


class SimulatorRunner:
    """Runs cases on the simulator (tests/sim/conftest.py)."""

    def __init__(self, sim, memory, seed: int = 0):
        self._sim, self._memory, self._seed = sim, memory, seed

    def put(self, array):
        return self._memory.put(array, alignment=16)

    def empty(self, shape, dtype):
        return self._memory.empty(shape, dtype, alignment=16)

    def get(self, buffer):
        return buffer.array.copy()

    def launch(self, name, arguments):
        self._sim.run(name, *arguments, seed=self._seed)


def write() -> None:
    """Computes all vectors on the simulator and writes the files whose vectors have changed."""
    sys.path.insert(0, str(HERE.parent / "sim"))
    import conftest

    sim = conftest.Simulator(conftest.build(conftest.ROOT / "build/sim"))
    arrays: dict[str, dict[str, np.ndarray]] = {}
    for case in CASES:
        with sim.memory() as memory:
            for i, result in enumerate(case.run(SimulatorRunner(sim, memory))):
                arrays.setdefault(case.launcher.removeprefix("sim_"), {})[f"{case.name}/{i}"] = smallest(result)
    for old in set(FOLDER.glob("*.npz")) - {FOLDER / f"{name}.npz" for name in arrays}:
        old.unlink()
    for name, vectors in arrays.items():
        if not _is(FOLDER / f"{name}.npz", vectors):
            np.savez_compressed(FOLDER / f"{name}.npz", **vectors)
            print(f"{len(vectors)} vectors: {FOLDER / name}.npz")


def _is(file: Path, vectors: dict[str, np.ndarray]) -> bool:
    if not file.is_file():
        return False
    with np.load(file) as data:
        same = data.files == list(vectors)
        return same and all(np.array_equal(data[k], v) and data[k].dtype == v.dtype for k, v in vectors.items())


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit(__doc__)
    write()
