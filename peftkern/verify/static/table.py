"""Tables of the static audit: a line per CUDA kernel and architecture, a line per Triton kernel over its variants."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from peftkern.screen import Table

from . import occupancy
from .records import Row

Audited = Sequence[tuple[Row, Sequence[str]]]
_PRODUCTS = ("HGMMA", "HMMA", "UTCMMA")
_COPIES = ("UTMALDG", "UTMASTG", "UBLKCP")


def _accesses(mixes: Iterable[dict[str, int]], name: str) -> str:
    """Number of accesses by bits, widest first: ``128:6 32:48``; of several kernels, the sum."""
    counts: dict[int, int] = {}
    for mix in mixes:
        for kind, n in mix.items():
            what, _, bits = kind.partition(".")
            if what == name:
                counts[int(bits)] = counts.get(int(bits), 0) + n
    return " ".join(f"{bits}:{n}" for bits, n in sorted(counts.items(), reverse=True))


def _some(mixes: Sequence[dict[str, int]], kinds: Sequence[str]) -> str:
    found = {kind: sum(mix.get(kind, 0) for mix in mixes) for kind in kinds}
    return " ".join(f"{kind}:{n}" for kind, n in found.items() if n)


def _copies(mixes: Sequence[dict[str, int]]) -> str:
    staged = _accesses(mixes, "LDGSTS")
    return " ".join(filter(None, [_some(mixes, _COPIES), f"cp.async {staged}" if staged else ""]))


def _instructions(mixes: Sequence[dict[str, int]]) -> list[str]:
    return [_some(mixes, _PRODUCTS), _copies(mixes), _accesses(mixes, "LDG"), _accesses(mixes, "STG")]


def _spills(row: Row) -> int:
    return row.stack + row.local + row.mix.get("LDL", 0) + row.mix.get("STL", 0)


def _warps(rows: Sequence[Row]) -> str:
    return f"{min(r.warps for r in rows)}/{occupancy.limits(rows[0].arch).warps}"


_LAST = ("products", "copies", "loads\nbits:number", "stores\nbits:number")


def cuda_table(title: str, results: Audited) -> Table:
    """Shared memory is static + dynamic; warps are those of a multiprocessor, of how many it can have."""
    columns = ("kernel", "arch", "regs", "spills", "threads", "shared", "warps", *_LAST)
    table = Table(title, columns, left=("kernel", "arch", *_LAST))
    for row, problems in results:
        name = row.kernel.replace("_kernel", "").replace(", ", ",")
        shared = f"{row.shared}+{'?' if row.dynamic is None else row.dynamic}"
        cells = (row.registers, _spills(row), row.launched or row.threads, shared, _warps([row]))
        table.add(name, row.arch, *cells, *_instructions([row.mix]), style="red" if problems else "")
    return table


def triton_table(title: str, results: Audited) -> Table:
    """The worst of all variants; numbers of instructions are sums over them."""
    columns = ("kernel", "arch", "variants", "regs", "spills", "shared", "warps", *_LAST)
    table = Table(title, columns, left=("kernel", "arch", *_LAST))
    for kernel, arch in dict.fromkeys((row.kernel, row.arch) for row, _ in results):
        rows = [r for r, _ in results if (r.kernel, r.arch) == (kernel, arch)]
        bad = any(problems for r, problems in results if (r.kernel, r.arch) == (kernel, arch))
        table.add(
            kernel, arch, len(rows), max(r.registers for r in rows), sum(map(_spills, rows)),
            max(r.total_shared for r in rows), _warps(rows), *_instructions([r.mix for r in rows]),
            style="red" if bad else "",
        )  # fmt: skip
    return table
