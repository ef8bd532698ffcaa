"""What the layers of methods cost: tables on the terminal and for documents, and a plot of bars."""

from __future__ import annotations

from pathlib import Path

from peftkern.methods import METHODS, STREAM
from peftkern.screen import Cell, Table

from ..core.case import BASE, PASSES
from ..methods import LIBRARY, OURS
from . import markdown as md
from .figure import OURS as BLUES
from .figure import PALETTE, quartiles, ratio_axes, result_figure
from .shares import SHARES, cells, heads, shares
from .terminal import PASS_TITLES, SPREAD, spread

NOTE = (
    f"{SPREAD} saved: bytes that a forward pass keeps for backward, parameters apart. {SHARES}: shares of our time that the"
    " layer's FLOPs at the peak and its bytes at copy speed explain, those of its codes if it is in codes. A line in from the"
    " margin is ours over another layer, its gain the time of that over ours. Layers of other kinds are compared with"
    " frozen ones of their own; what acts in the residual stream computes no layer: it is timed alone, or in a whole model,"
    " beside the frozen one."
)
LIBRARIES = {"peft": "PEFT", "torch": "torch's steps"}
PROVIDERS = {LIBRARY: PALETTE[1], OURS: BLUES[0]}


def _groups(rows: list[dict], *fields: str) -> dict[tuple, list[dict]]:
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in fields), []).append(row)
    return groups


def _lines(rows: list[dict]) -> list[tuple[tuple, dict[str, dict], dict[str, dict]]]:
    """Of one dtype: (method, shape, rank, dropout), the rows of both providers by pass, and the frozen linear's."""
    found = []
    for key, own in _groups(rows, "method", "M", "K", "N", "R").items():
        bases = {r["pass"]: r for r in own if r["provider"] == BASE}
        for (dropout,), pair in _groups([r for r in own if r["provider"] in PROVIDERS], "dropout").items():
            found.append(((*key, dropout), {(r["provider"], r["pass"]): r for r in pair}, bases))
    return found


def _others(rows: list[dict], case: tuple, which: str) -> list[tuple[str, dict]]:
    """What else of ours was timed in this case: by what it is over (``dense``)."""
    fields, start = ("method", "M", "K", "N", "R", "dropout", "pass"), f"{OURS}_"
    found = [r for r in rows if r["provider"].startswith(start) and tuple(r[f] for f in fields) == (*case, which)]
    return [(f"{OURS}, {row['provider'].removeprefix(start)}", row) for row in found]


def _gain(other: dict, ours: dict | None) -> str:
    """The time of another of ours over that of ours."""
    times = other["median_ms"], ours and ours["median_ms"]
    return f"{times[0] / times[1]:.2f}x" if all(times) else "-"


def _slow(rows: list[dict]) -> bool:
    """Whether the dtype's own frozen linear is too slow to compare with, so that the fp32 one takes its place."""
    return all(r["median_ms"] is None for r in rows if r["provider"] == BASE)


def _ratio(rows: list[dict]) -> str:
    return "ratio_to_fp32_base" if _slow(rows) else "ratio_to_base"


def _over(rows: list[dict]) -> str:
    return "the frozen fp32 linear (this dtype's own is too slow)" if _slow(rows) else "the frozen linear"


def megabytes(row: dict | None) -> str:
    """What a row's forward pass keeps."""
    return "-" if row is None or row["saved_bytes"] is None else f"{row['saved_bytes'] / 1e6:.1f}"


def number(row: dict | None, field: str, form: str = "{:.2f}") -> str:
    """A number of a row, or a dash."""
    return "-" if row is None or row[field] is None else form.format(row[field])


def _beside(by: dict[tuple, dict]) -> str:
    # Whose code ours is compared with; older results know PEFT alone.
    name = next(iter(by.values())).get("beside", "peft")
    return LIBRARIES.get(name, name)


def machines(results: list[dict]) -> list[list[dict]]:
    """Results in groups, those of one machine and torch together."""
    groups: dict[tuple, list[dict]] = {}
    for result in results:
        header = result["header"]
        cpu = header["cpu"]
        model = tuple(cpu.get("model_id") or ())
        machine = (header["device"], model, cpu["torch_isa"], header["threads"], header["versions"]["torch"])
        groups.setdefault(machine, []).append(result)
    return list(groups.values())


def newest(results: list[dict]) -> list[dict]:
    """The rows of all, of each block those of its last measurement, in the order of the registry."""
    blocks: dict[tuple, list[dict]] = {}
    for result in sorted(results, key=lambda r: r["header"]["date"]):
        blocks |= _groups(result["rows"], "dtype", "method", "M", "K", "N", "R")
    order = {name: i for i, name in enumerate((*METHODS, *STREAM))}

    def place(key: tuple) -> int:
        # A form stands behind its method's name.
        return order.get(key[1].partition(", ")[0], len(order))

    return [row for key in sorted(blocks, key=place) for row in blocks[key]]


def tables(rows: list[dict]) -> list[Table]:
    """One for each dtype and pass, a line for each method and case."""
    found = []
    for (dtype,), own in _groups(rows, "dtype").items():
        field = _ratio(own)
        for which in PASSES:
            title = f"methods, {dtype}, {PASS_TITLES[which]}: times over {_over(own)}"
            columns = ("method", "M x K x N", "R", "drop", "beside", "linear\nms", "library", "peftkern", "gain",
                       "library\nsaved, MB", "peftkern\nsaved, MB", SHARES.replace(", ", "\n"))  # fmt: skip
            table = Table(title, columns, left=("method", "beside"), caption=NOTE)
            for (method, M, K, N, R, dropout), by, bases in _lines(own):
                theirs, ours = by.get((LIBRARY, which)), by.get((OURS, which))
                saved = [by.get((name, "fwd_bwd")) for name in PROVIDERS]
                table.add(
                    method, f"{M}x{K}x{N}", str(R or "-"), f"{dropout:g}", _beside(by),
                    number(bases.get(which), "median_ms"),
                    *(_timed(row, field) for row in (theirs, ours)), Cell(number(ours, "speed_up", "{:.2f}x"), "bold"),
                    *map(megabytes, saved), shares([ours] if ours else []),
                )  # fmt: skip
                for name, other in _others(own, (method, M, K, N, R, dropout), which):
                    table.add(
                        f"  {name}", f"{M}x{K}x{N}", str(R or "-"), f"{dropout:g}", OURS,
                        number(bases.get(which), "median_ms"), "-", _timed(other, field), _gain(other, ours), "-",
                        megabytes(other), shares([other]),
                    )  # fmt: skip
            found.append(table)
    return found


def _timed(row: dict | None, field: str) -> Cell:
    if row is not None and row["skipped"]:
        return Cell("slow" if row["skipped"].startswith("hopelessly slow") else "none", "red")
    return Cell("-" if row is None or row[field] is None else f"{row[field]:.3f}{spread(row)}")


def markdown(rows: list[dict], dtype: str) -> list[str]:
    """Lines for the documents: forward + backward of one dtype."""
    field, lines, more = _ratio(rows), [], heads(rows, SHARES)
    for (method, M, K, N, R, dropout), by, _ in _lines(rows):
        theirs, ours = by.get((LIBRARY, "fwd_bwd")), by.get((OURS, "fwd_bwd"))
        lines.append(
            [method, f"{M}x{K}x{N}", str(R or "-"), f"{dropout:g}", _beside(by), number(theirs, field),
             number(ours, field), number(ours, "speed_up", "{:.2f}x"), megabytes(theirs), megabytes(ours),
             *cells([ours] if ours else [], more)]
        )  # fmt: skip
    head = [
        "method",
        "M x K x N",
        "R",
        "dropout",
        "beside",
        "library",
        "**peftkern**",
        "gain",
        "library saves, MB",
        "**peftkern** saves, MB",
        *more,
    ]
    return [f"{dtype}, forward + backward: time over {_over(rows)}", "", *md.table(head, lines)]


def plot(result: dict, folder: Path) -> list[Path]:
    """``methods-<dtype>.png`` for each dtype: a panel for each shape and dropout, two bars for each method."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for (dtype,), rows in _groups(result["rows"], "dtype").items():
        field = _ratio(rows)
        drawn = [r for r in rows if r["provider"] in PROVIDERS and r["pass"] == "fwd_bwd" and r[field] is not None]
        if drawn:
            files.append(_bars(result, dtype, drawn, field, folder / f"methods-{dtype}.png"))
    return files


def _bars(result: dict, dtype: str, rows: list[dict], field: str, file: Path) -> Path:
    methods = list(dict.fromkeys(r["method"] for r in rows))
    panels = _groups(rows, "M", "K", "N", "dropout")
    title = (
        f"A training step of a layer, {dtype}, fp32 adapters: the library's own and accelerated, over a frozen linear"
    )
    width = max(7.5, 1.5 + 0.7 * len(methods))
    figure, axes = result_figure(result, title, len(panels), width=width, notes=[])
    for ax, own in zip(axes, panels.values()):
        for i, (name, colour) in enumerate(PROVIDERS.items()):
            for j, method in enumerate(methods):
                timed = [r for r in own if r["method"] == method and r["provider"] == name]
                if timed:
                    value, below, above = quartiles(timed, field)
                    x = j + (i - 0.5) * 0.42
                    ax.bar(x, value - 1, 0.39, bottom=1, color=colour, label=name, zorder=2)
                    ax.errorbar(x, value, ((below,), (above,)), color="#222222", elinewidth=0.9, capsize=1.8, zorder=3)
        ax.set_xticks(range(len(methods)), methods, fontsize=8, rotation=30, ha="right")
    words = [f"{M} x {K} x {N}" + (f", dropout {p:g}" if p else "") for M, K, N, p in panels]
    ratio_axes(axes, "time / frozen linear" if field == "ratio_to_base" else "time / frozen fp32 linear", words)
    return figure.save(file, PROVIDERS)
