"""Recorded bounds of compiled kernels, and what breaks them.

Some things hold for every kernel: no spills, no stack, no float atomics, launch bounds, room for at least one block. The
rest is recorded in ``bounds/*.json`` for each kernel and version of the compiler, and may not get worse:

    registers, shared    at most (registers rounded up to a multiple of 8: they are given out so)
    warps                on a multiprocessor, at least
    mix                  matrix instructions, tile copies and accesses of 16 bytes at least, narrower accesses at most

With a compiler that has no record here, the first three are not compared, and of the mix only that no kind is lost
which every other compiler makes.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from . import occupancy
from .loops import MainLoop
from .sass import narrow

FOLDER = Path(__file__).with_name("bounds")
_FORBIDDEN = ("LDL", "STL", "float atomic")
_IGNORED = ("atomic",)


@dataclass(frozen=True)
class Row:
    """One compiled kernel, as it is launched.

    ``threads``: the most that its launch bounds allow, 0 if it has none; ``launched``: those of its launches, 0 for that
    many. ``shared`` is static, ``dynamic`` None if no launch is known.
    """

    key: str
    kernel: str
    arch: str
    compiler: str
    threads: int
    registers: int
    stack: int
    local: int
    shared: int
    dynamic: int | None
    mix: dict[str, int]
    loops: tuple[MainLoop, ...] = ()
    launched: int = 0

    @property
    def total_shared(self) -> int:
        """Bytes of shared memory of a block."""
        return self.shared + (self.dynamic or 0)

    @property
    def warps(self) -> int:
        """Resident warps on a multiprocessor."""
        threads = self.launched or self.threads
        if not threads:
            return 0
        return -(-threads // 32) * occupancy.blocks(self.arch, threads, self.registers, self.total_shared)

    def measured(self) -> dict:
        """What is recorded of it."""
        mix = {k: n for k, n in self.mix.items() if k not in (*_FORBIDDEN, *_IGNORED)}
        registers = min(255, -(-self.registers // 8) * 8)
        # With the registers that the bound allows, so that whoever stays within it has the warps too.
        warps = Row(**{**vars(self), "registers": registers}).warps
        return dict(registers=registers, shared=self.total_shared, warps=warps, mix=mix)

    def as_json(self) -> dict:
        """Every figure, for ``--json``."""
        return asdict(self) | {"warps": self.warps}


def always(row: Row) -> list[str]:
    """What no kernel may do."""
    found = []
    if row.stack or row.local:
        found.append(f"{row.stack} bytes of stack, {row.local} of local memory")
    if spills := row.mix.get("LDL", 0) + row.mix.get("STL", 0):
        found.append(f"{spills} accesses of local memory (LDL, STL)")
    if row.mix.get("float atomic"):
        found.append(f"{row.mix['float atomic']} float atomics: sums would depend on the order of blocks")
    if not row.threads:
        found.append("no __launch_bounds__: nothing says that a block gets its registers")
    elif row.launched > row.threads:
        found.append(f"launched with {row.launched} threads, its bounds allow {row.threads}")
    elif not row.warps:
        needs = f"{row.launched or row.threads} threads, {row.registers} registers, {row.total_shared} bytes shared"
        found.append(f"no block fits: {needs}")
    return found


def hopper(row: Row) -> list[str]:
    """A kernel of sm_90a that multiplies: operands by TMA, one wait per k step."""
    if row.arch != "sm_90a" or not row.mix.get("HGMMA"):
        return ["no HGMMA"] if row.arch == "sm_90a" and "linear" in row.kernel else []
    found = [] if row.mix.get("UTMALDG") else ["HGMMA without UTMALDG: operands do not come by TMA"]
    if not row.loops:
        found.append("no loop holds its HGMMA")
    return found + [p for loop in row.loops for p in loop.problems()]


def _mix(now: dict[str, int], then: dict[str, int], counts: bool) -> list[str]:
    found = []
    for kind in sorted({*now, *then} - {*_FORBIDDEN, *_IGNORED}):
        is_now, was = now.get(kind, 0), then.get(kind, 0)
        if narrow(kind):
            if counts and is_now > was:
                found.append(f"{is_now} {kind}, {was} recorded: accesses have become narrower")
        elif is_now < was if counts else was and not is_now:
            found.append(f"{is_now} {kind}, {was} recorded")
    return found


def broken(row: Row, recorded: dict[str, dict]) -> list[str]:
    """What is worse than recorded. ``recorded``: by compiler; empty if the kernel has no bounds."""
    if not recorded:
        return ["no bounds recorded: run with --record"]
    if row.compiler not in recorded:
        mixes = [r["mix"] for r in recorded.values() if "mix" in r]
        common = dict.fromkeys(set.intersection(*map(set, mixes)) if mixes else (), 1)
        return _mix(row.mix, common, counts=False)
    bound = recorded[row.compiler]
    found = []
    if row.registers > bound["registers"]:
        found.append(f"{row.registers} registers, {bound['registers']} recorded")
    if row.total_shared > bound["shared"]:
        found.append(f"{row.total_shared} bytes of shared memory, {bound['shared']} recorded")
    if row.warps < bound.get("warps", 0):
        found.append(f"{row.warps} warps on a multiprocessor, {bound['warps']} recorded")
    return found + (_mix(row.mix, bound["mix"], counts=True) if "mix" in bound else [])


def read(name: str) -> dict[str, dict[str, dict]]:
    """By key, by compiler. Empty if the file is not there."""
    file = FOLDER / f"{name}.json"
    return json.loads(file.read_text()) if file.is_file() else {}


def write(name: str, content: dict) -> None:
    """One line for each key, in order."""
    lines = ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in sorted(content.items()))
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / f"{name}.json").write_text(f"{{\n{lines}\n}}\n")


def record(name: str, rows: list[Row], keep: dict[str, dict[str, dict]]) -> None:
    """Write what is measured now; of ``keep`` (by key) what other compilers made of the same kernels."""
    new = {r.key: {**keep.get(r.key, {}), r.compiler: r.measured()} for r in rows}
    write(name, {key: dict(sorted(by.items())) for key, by in new.items()})
