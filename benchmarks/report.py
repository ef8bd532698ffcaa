"""Tables in README and docs/ from committed results, and the verdict on a result.

    python -m peftkern.benchmarks.report            write what stands between the markers in README and docs/
    python -m peftkern.benchmarks.report --check    exit code 1 if a document is not what the results say
    python -m peftkern.benchmarks.report --judge FILE

A table stands between ``<!-- benchmarks:NAME -->`` and ``<!-- /benchmarks:NAME -->``; everything between is generated. NAME
is an op, or one of VIEWS. ``calculated`` instead of ``benchmarks`` marks what follows from formulas alone (performance.py),
``methods`` the table of methods (tables/methods.py).
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from . import generate, small
from .core.machine import held_back
from .judge.figures import Figure, on_gpu
from .registry import OPS
from .tables import bottleneck, codes, markdown, method_times, methods, performance, summary

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
README = HERE.parent / "README.md"
PERFORMANCE = HERE.parent / "docs" / "performance.md"
METHODS = HERE.parent / "docs" / "methods.md"
USAGE = HERE.parent / "docs" / "usage.md"
MARKERS = re.compile(r"(<!-- ((?:benchmarks|calculated|methods):\w+) -->\n).*?(<!-- /\2 -->)", re.S)
# Of commands of their own.
OWN_TABLES = {
    "generate": generate.markdown,
    **dict.fromkeys(("small_calls", "small_shapes", "small_models"), small.markdown),
    "methods": method_times.markdown,
    "bottleneck_adapter": bottleneck.markdown,
    "bases": codes.markdown,
}
NOTHING = "No result of a GPU is committed yet.\n"
# What else can be told of the results of an op: its view NAME is marked NAME_OP.
VIEWS = {f"{view}_{op}": (op, bench.views[view]) for op, bench in OPS.items() for view in bench.views}


def load(folder: Path = RESULTS) -> list[dict]:
    """Results of the benchmark in file-name order (other JSON files are left out).

    Raises ValueError for one that shows less than its machine can do.
    """
    found = {file.stem: json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))}
    found = {
        stem: r for stem, r in found.items() if isinstance(r, dict) and "rows" in r and "op" in r.get("header", {})
    }
    for stem, result in found.items():
        reason = held_back(result["header"])
        if reason:
            raise ValueError(f"{stem}.json: {reason}; documents show what real machines do")
    return [r | {"header": r["header"] | {"file": stem}} for stem, r in found.items()]


def tables(op: str, results: list[dict]) -> str:
    """Markdown for every machine that ``op`` was measured on."""
    found = [r for r in results if r["header"]["op"] == op]
    if op == "methods":  # parts of one table
        groups = [([r["header"] for r in own], method_times.newest(own)) for own in method_times.machines(found)]
    else:
        groups = [([r["header"]], r["rows"]) for r in found]
    return "\n".join(_machine(*group) for group in groups) or "No results yet.\n"


def part(name: str, results: list[dict]) -> str:
    """What stands between the markers of that name."""
    kind, _, name = name.partition(":")
    if kind == "calculated":
        return performance.CALCULATED[name]() + "\n"
    if kind == "methods":
        return "\n".join(methods.PARTS[name]())
    if name == "summary":
        return "\n".join(summary.gains({r["header"]["file"]: r for r in results}))
    if name == "coverage":
        return "\n".join(summary.coverage())
    if name not in VIEWS:
        return tables(name, results)
    op, view = VIEWS[name]
    chosen = [r for r in results if r["header"]["op"] == op and (on_gpu(r) or not view.of_gpus)]
    return "\n".join("\n".join([*_heading(r["header"]), *view.lines(r)]) for r in chosen) or NOTHING


def _machine(headers: list[dict], rows: list[dict]) -> str:
    lines = _heading(*headers)
    table = OWN_TABLES.get(headers[0]["op"], markdown.markdown)
    for dtype in dict.fromkeys(r["dtype"] for r in rows):
        lines += table([r for r in rows if r["dtype"] == dtype], dtype)
    return "\n".join(lines)


def _heading(*headers: dict) -> list[str]:
    header = headers[0]
    isa = header["gpu"]["arch"] if header["gpu"] else _isa(header["cpu"])
    dates = sorted({h["date"][:10] for h in headers})
    commits = dict.fromkeys((h["commit"] or "unknown")[:10] for h in headers)
    files = [f", `{h['file']}.json`" for h in headers if "file" in h]
    return [
        f"**{header['device']}** ({isa}), {header['threads']} threads, {', '.join([*_rates(headers), *_packages(headers)])}, "
        f"{' to '.join(dict.fromkeys((dates[0], dates[-1])))}, commit{'s' * (len(commits) > 1)} {', '.join(commits)}"
        + "".join(files),
        "",
    ]


def _rates(headers: Sequence[dict]) -> list[str]:
    # Those of one run alone: shares are of the rates of their own.
    peaks = headers[0].get("fma_gflop_per_s") if len(headers) == 1 else None
    if not peaks:
        return []
    return [
        f"copy {headers[0]['copy_gb_per_s']:.0f} GB/s",
        *(f"{name} peak {rate:.0f} GFLOP/s" for name, rate in peaks.items()),
    ]


def _packages(headers: list[dict]) -> list[str]:
    # torch, and the libraries that something is compared with.
    words = {
        "torch": "torch",
        "peft": "PEFT",
        "adapters": "adapters",
        "pyreft": "pyreft",
        "bitsandbytes": "bitsandbytes",
    }
    found = [(name, h["versions"].get(name)) for name in words for h in headers]
    return [f"{words[name]} {version}" for name, version in dict.fromkeys(found) if version or name == "peft"]


def _isa(cpu: dict) -> str:
    extra = [f for f in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if f in cpu["features"]]
    _, *numbers = cpu.get("model_id") or [""]
    return ", ".join([*(f"{what} {n}" for what, n in zip(("family", "model"), numbers)), cpu["torch_isa"], *extra[:1]])


def render(text: str, results: list[dict]) -> str:
    """``text`` with every marked part replaced."""
    return MARKERS.sub(lambda m: m[1] + part(m[2], results) + m[3], text)


def verdict(found: list[Figure]) -> tuple[str, int]:
    """Lines to print and the exit code: 1 if a limit is missed."""
    words = {True: "ok", False: "MISSED", None: "-"}
    lines = [
        f"{words[f.ok]:<6}  {'n/a' if f.value is None else format(f.value, '.3f'):>7}  {f.limit:<8}  {f.name}"
        + (f"  ({f.note})" if f.note else "")
        for f in found
    ]
    return "\n".join(lines), int(any(f.ok is False for f in found))


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m peftkern.benchmarks.report", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--check", action="store_true", help="write nothing, fail if a document is stale")
    parser.add_argument("--judge", type=Path, metavar="FILE", help="the figures of this result against the limits")
    parser.add_argument("--readme", type=Path, help="this document alone")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    if args.judge:
        result = json.loads(args.judge.read_text())
        lines, code = verdict(OPS[result["header"]["op"]].judge(result))
        print(lines)
        return code
    documents = [args.readme] if args.readme else [README, PERFORMANCE, METHODS, USAGE]
    return max(_document(path, load(args.results), check=args.check) for path in documents)


def _document(path: Path, results: list[dict], *, check: bool) -> int:
    old = path.read_text()
    if not MARKERS.search(old):
        print(f"{path} has no <!-- benchmarks:OP --> ... <!-- /benchmarks:OP -->", file=sys.stderr)
        return 1
    new = render(old, results)
    if check:
        if new != old:
            print(f"{path} is stale: run python -m peftkern.benchmarks.report", file=sys.stderr)
        return int(new != old)
    path.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
