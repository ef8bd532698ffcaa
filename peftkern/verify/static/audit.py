"""``peftkern verify --static``: what compilers made of every kernel, held against recorded bounds. No GPU is needed.

For each CUDA kernel (sm_80, 90, 90a, 100, 120) and each variant of a Triton kernel (sm_80, 90, 100, 120): registers, spills,
shared memory, resident warps per multiprocessor, and how many instructions of each kind. records.py says what a
kernel must never do and what is compared with the record.

CUDA kernels are those inside ``peftkern._C``, or the sources of a checkout if it has none or is out of date. Triton kernels
are compiled here, from the launches of whole ops; the first time that takes minutes.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import importlib.util
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from peftkern.screen import Console

from . import cubins, cuda, cuda_launches, records
from .records import Row
from .table import cuda_table, triton_table

TRITON = ("lora_linear", "multi_lora_linear", "bottleneck_adapter", "quantised")


@dataclass(frozen=True)
class Result:
    """A kernel and what is wrong with it."""

    row: Row
    problems: tuple[str, ...]


def add_arguments(p: argparse.ArgumentParser) -> None:
    """Options of this command."""
    p.add_argument("--static", action="store_true", help="audit compiled kernels instead; needs no GPU")
    group = p.add_argument_group("with --static")
    group.add_argument("--kernels", choices=("cuda", "triton", "all"), default="all")
    group.add_argument("--arch", nargs="+", metavar="SM", help="only these, such as 80 90a (default: all)")
    group.add_argument("--record", action="store_true", help="write the bounds of what is compiled now; in a checkout")
    group.add_argument(
        "--keep-launches", action="store_true", help="with --record: don't run tests/sim to see launches"
    )


def _wanted(arch: str, archs: list[str] | None) -> bool:
    return not archs or arch.removeprefix("sm_") in archs


def audit_cuda(origin: cuda.Origin, archs: list[str] | None, advance: Callable[[], None]) -> list[Row]:
    """Every CUDA kernel."""
    rows = []
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for found in pool.map(cuda.rows, origin.cubins):
            rows += [row for row in found if _wanted(row.arch, archs)]
            advance()
    return sorted(rows, key=lambda row: (row.kernel, len(row.arch), row.arch))


def triton_unavailable() -> str | None:
    """Why Triton's kernels are left out."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    from . import triton

    return triton.unavailable()


def triton_variants(op: str, archs: list[str] | None) -> dict[tuple[int, bool], list[int]]:
    """Which launches to compile so that each variant is compiled once: positions by case, (index, among the standard)."""
    from . import triton

    launches, seen, todo = importlib.import_module(f".launches.{op}", __package__), set(), {}
    for standard, cases in ((True, launches.STANDARD), (False, launches.MORE)):
        for index, case in enumerate(cases):
            if not _wanted(str(case.arch), archs):
                continue
            for position, item in enumerate(launches.capture(case)):
                name = triton.key(item, case.arch)
                if name not in seen:
                    seen.add(name)
                    todo.setdefault((index, standard), []).append(position)
    return todo


def compile_variants(op: str, which: tuple[int, bool], positions: list[int]) -> list[Result]:
    """Compile some launches of a case; what is wrong with their code, bounds aside."""
    from . import triton

    launches = importlib.import_module(f".launches.{op}", __package__)
    case = (launches.STANDARD if which[1] else launches.MORE)[which[0]]
    with triton.own_cache():
        items = launches.capture(case)
        reports = triton.reports([items[position] for position in positions], case.arch)
    return [Result(r.row, tuple(p for check in launches.CHECKS for p in check(r))) for r in reports]


def audit_triton(op: str, todo: dict[tuple[int, bool], list[int]], advance: Callable[[], None]) -> list[Result]:
    """These variants (of ``triton_variants``) of the Triton kernels of an op."""
    if len(todo) == 1:
        ((which, positions),) = todo.items()
        return compile_variants(op, which, positions)
    results = []
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(min(8, os.cpu_count() or 1), mp_context=spawn) as pool:
        for done in [pool.submit(compile_variants, op, *one) for one in todo.items()]:
            for result in done.result():
                results.append(result)
                advance()
    return results


def _compared(results: list[Result], bounds: dict) -> list[Result]:
    return [
        Result(r.row, (*r.problems, *records.broken(r.row, bounds.get(r.row.key, {})))) for r in results
    ]  # fmt: skip


def _unknown_compilers(rows: list[Row], bounds: dict) -> Iterator[str]:
    found = {r.compiler for r in rows if r.compiler not in bounds.get(r.key, {r.compiler: 0})}
    for compiler in sorted(found):
        yield f"no bounds were recorded with {compiler}: registers, memory and numbers of instructions are not compared"


class _Audit:
    """One run: what was found, what was left out."""

    def __init__(self, args: argparse.Namespace, console):
        self.args, self.console = args, console
        self.rows: list[tuple[str, Result]] = []
        self.skipped: dict[str, str] = {}
        self.notes: list[str] = []
        self.gone: list[str] = []

    def _finish(self, name: str, results: list[Result], bounds: dict, table, gone: list[str]) -> None:
        self.notes += _unknown_compilers([r.row for r in results], bounds)
        self.rows += [(name, r) for r in results]
        self.gone += gone
        self.console.print(table([(r.row, r.problems) for r in results]))

    def cuda(self) -> None:
        """The CUDA kernels."""
        if self.args.record and not self.args.keep_launches and cuda_launches.record() != 0:
            self.gone.append("tests/sim failed: what launches ask for is not recorded completely")
        origin = cuda.origin()
        if isinstance(origin, str):
            self.skipped["cuda"] = origin
            return
        with self.console.progress(len(origin.cubins)) as progress:
            progress.say("CUDA kernels")
            rows = audit_cuda(origin, self.args.arch, progress.advance)
        bounds = records.read(cuda.BOUNDS)
        if self.args.record:
            records.record(cuda.BOUNDS, rows, bounds)
            bounds = records.read(cuda.BOUNDS)
        results = [Result(row, tuple(cuda.problems(row, bounds.get(row.key, {})))) for row in rows]
        table = functools.partial(cuda_table, f"CUDA kernels ({origin.name})")
        self._finish("cuda", results, bounds, table, cuda.absent(rows, bounds))

    def triton(self, op: str) -> None:
        """The Triton kernels of an op."""
        if reason := triton_unavailable():
            self.skipped[f"triton, {op}"] = reason
            return
        from . import triton

        launches = importlib.import_module(f".launches.{op}", __package__)
        todo = triton_variants(op, self.args.arch)
        with self.console.progress(sum(map(len, todo.values()))) as progress:
            progress.say(f"Triton kernels of {op}")
            results = audit_triton(op, todo, progress.advance)
        bounds = records.read(launches.BOUNDS)
        if self.args.record:
            records.record(launches.BOUNDS, [r.row for r in results], bounds)
            bounds = records.read(launches.BOUNDS)
        there = {r.row.key for r in results}
        gone = [k for k in bounds if _wanted(k.split()[0], self.args.arch) and k not in there]
        table = functools.partial(triton_table, f"Triton kernels of {op} (Triton {triton.VERSION})")
        gone = [f"{k}: bounds of a variant that is gone" for k in gone]
        self._finish(f"triton, {op}", _compared(results, bounds), bounds, table, gone)

    def report(self) -> int:
        """The last lines and the exit code."""
        failed = [(name, r) for name, r in self.rows if r.problems]
        for _, r in failed:
            self.console.print("\n".join([f"FAILED {r.row.key}", *(f"  {p}" for p in r.problems)]), style="red")
        for line in self.gone:
            self.console.print(f"FAILED {line}", style="red")
        for name, reason in self.skipped.items():
            self.console.print(f"{name}: not audited: {reason}", style="yellow")
        for note in dict.fromkeys(self.notes):
            self.console.print(note, style="yellow")
        self.console.print(f"{len(self.rows)} compiled kernels, {len(failed) + len(self.gone)} failures")
        if self.args.json:
            from peftkern import doctor

            header = doctor.report() | {"command": {k: str(v) for k, v in vars(self.args).items() if v}}
            rows = [r.row.as_json() | {"back_end": name, "problems": r.problems} for name, r in self.rows]
            content = {"header": header, "skipped": self.skipped, "absent": self.gone, "rows": rows}
            self.args.json.parent.mkdir(parents=True, exist_ok=True)
            self.args.json.write_text(json.dumps(content, indent=1) + "\n")
        asked = self.args.kernels != "all" and self.skipped
        return 1 if failed or self.gone or asked or not self.rows else 0


def run(args: argparse.Namespace) -> int:
    """The command. Exit code 1 on a broken bound, or if nothing could be audited that was asked for."""
    console = Console()
    if args.record and (cubins.checkout() is None or args.arch):
        console.print("--record needs a checkout of the sources and every architecture", style="red")
        return 2
    audit = _Audit(args, console)
    if args.kernels in ("cuda", "all"):
        audit.cuda()
    if args.kernels in ("triton", "all"):
        for op in TRITON:
            audit.triton(op)
    return audit.report()
