"""``peftkern verify``: random problems against fp64, on every back end that this machine has.

An output or gradient passes if its error is at most 1.5 times that of eager PyTorch on the same problem, or below the
rounding floor (peftkern/testing/accuracy.py says exactly). ``ratio`` in the table is the error over that bound. Each
problem has a name (problem_sets.py says which), and ``--problem NAME`` runs that one again.

On CPU tensors the ``cpu`` back end runs once with each base product (``--cpu-base``), and Triton in its interpreter, on
fewer and smaller problems, without bf16, which the interpreter gets wrong by itself. On CUDA tensors there are
``triton``, ``auto``, which is what a user gets, and ``cuda``, where the CUDA kernels take all that they can and others
the rest: a problem of which they take nothing is counted as declined. A back end without kernels for the op is named
and left out.

``--static`` runs nothing: it audits what the compilers made of every kernel (static/audit.py), GPU or not.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from peftkern.problem import DTYPES, short
from peftkern.screen import Cell, Console, Table
from peftkern.settings import current, using

from .problem_sets import SETS, set_of
from .static import audit

INTERPRETED = SETS["lora_linear"].limits
INTERPRETED_SHARE = 5
DECLINED = "declined"
# What can be asked for on each device, in the order of the table.
BACKENDS = {"cpu": ("reference", "cpu", "triton"), "cuda": ("reference", "cuda", "triton", "auto")}


@dataclasses.dataclass(frozen=True)
class Target:
    """A back end with its settings, the op it is to run and on what. ``interpreted``: Triton on CPU tensors.
    ``preferred``: what takes all that it can, whatever was measured."""

    name: str
    environment: dict[str, str]
    interpreted: bool = False
    op: str = "lora_linear"
    device: str = "cpu"
    preferred: str | None = None

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """The settings in force inside."""
        before = {k: os.environ.get(k) for k in self.environment}
        os.environ.update(self.environment)
        try:
            with using(candidate=self.preferred) if self.preferred else contextlib.nullcontext():
                yield
        finally:
            for k, v in before.items():
                os.environ.pop(k, None) if v is None else os.environ.__setitem__(k, v)

    def reason(self) -> str | None:
        """Why this target can't run its op here."""
        import peftkern  # noqa: F401  (registers the ops)
        from peftkern.dispatch import choose
        from peftkern.dispatch import registry as dispatch

        if self.device == "cuda" and not torch.cuda.is_available():
            return "torch sees no CUDA device"
        name = self.environment["PEFTKERN_BACKEND"]
        if name == "reference" or self.name == "auto":
            return None
        if self.interpreted and "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
            return "triton was imported without TRITON_INTERPRET=1; set it in the environment"
        with self.active():
            try:
                back_end = choose.load(self.preferred or name)
                why = back_end.unavailable(current())
            except ImportError as error:
                return str(error)
        parts = [p for p in dispatch.OPS if p.startswith(self.op) or (self.op, p) == ("multi_lora_linear", "sgmv_add")]
        missing = [part for part in parts if part not in back_end.OPS]
        if self.preferred and len(missing) < len(parts):
            missing = []
        return why or (f"has no kernel for {', '.join(missing)}" if missing else None)


def targets(
    backends: Sequence[str], cpu_base: str | None, op: str = "lora_linear", device: str = "cpu"
) -> list[Target]:
    """What ``--backend``, ``--cpu-base`` and ``--device`` ask for."""
    wanted = [name for name in BACKENDS[device] if name in backends or "all" in backends]
    found = []
    for name in wanted:
        if name == "cpu":
            for base in (cpu_base,) if cpu_base else ("vendor", "panels"):
                found.append(Target(f"cpu, {base}", {"PEFTKERN_BACKEND": "cpu", "PEFTKERN_CPU_BASE": base}, op=op))
        elif name == "triton" and device == "cpu":
            environment = {"PEFTKERN_BACKEND": "triton", "TRITON_INTERPRET": "1"}
            found.append(Target("triton, interpreted", environment, interpreted=True, op=op))
        elif name == "cuda":
            environment = {"PEFTKERN_BACKEND": "auto", "TRITON_INTERPRET": "0"}
            found.append(Target(name, environment, op=op, device=device, preferred="cuda"))
        else:
            environment = {"PEFTKERN_BACKEND": name} | ({"TRITON_INTERPRET": "0"} if device == "cuda" else {})
            found.append(Target(name, environment, op=op, device=device))
    return found


def named(name: str, **limits):
    """The problem of that name."""
    return set_of(name).make(name, **limits)


def names(count: int, dtypes: Sequence[str], seed: int, *, large: bool, op: str = "lora_linear") -> list[str]:
    """Names of ``count`` problems, dtypes in turn; ``large``: with the special ones."""
    return SETS[op].names(count, dtypes, seed, special=large)


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    p = argparse.ArgumentParser(
        prog="peftkern verify", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--op", choices=sorted(SETS), default="lora_linear")
    p.add_argument("--problems", type=int, default=60, metavar="N", help="how many, over all dtypes (default 60)")
    names = ("all", *dict.fromkeys(name for names in BACKENDS.values() for name in names))
    p.add_argument("--backend", nargs="+", choices=names, default=["all"])
    p.add_argument("--device", choices=sorted(BACKENDS), help="of the tensors; default: cuda if torch sees one")
    p.add_argument("--cpu-base", choices=("vendor", "panels", "auto"), help="only this base product (default: each)")
    p.add_argument("--dtype", nargs="+", choices=sorted(DTYPES), default=["fp32", "bf16", "fp16"])
    p.add_argument("--seed", type=int, default=0, help="of the first problem; the i-th has seed + i")
    p.add_argument("--problem", nargs="+", metavar="NAME", help="these problems only, as named by a failure")
    p.add_argument("--json", type=Path, metavar="FILE", help="write every row")
    audit.add_arguments(p)
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Exit code 1 on any failure, or if a back end that was asked for by name is not usable, or takes no
    problem."""
    args = parser().parse_args(argv)
    if args.static:
        return audit.run(args)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    elsewhere = set(args.backend) - {"all", *BACKENDS[device]}
    if elsewhere:
        parser().error(f"{', '.join(sorted(elsewhere))}: no back end of {device} tensors (--device)")
    for name in args.problem or ():
        try:
            SETS[args.op].parse(name)
        except ValueError as error:
            parser().error(f"{error} (--op {set_of(name).op})" if set_of(name).op != args.op else str(error))
    console = Console()
    started, usable = time.perf_counter(), []
    asked = targets(args.backend, args.cpu_base, args.op, device)
    for target in asked:
        reason = target.reason()
        if reason:
            console.print(f"{target.name}: not usable: {reason}", style="yellow")
        else:
            usable.append(target)
    unusable = not usable if "all" in args.backend else len(usable) < len(asked)
    work = [(t, name) for t in usable if t.interpreted for name in chosen(args, t)]
    # One problem after the other on every back end: what it is held against is computed once.
    native = [t for t in usable if not t.interpreted]
    work += [(t, name) for name in (chosen(args, native[0]) if native else ()) for t in native]
    rows = _run(work, console)
    idle = _say_declined(rows, console)
    declined = [r for r in rows if r["output"] == DECLINED]
    rows = [r for r in rows if r["output"] != DECLINED]
    failed = len({(r["backend"], r["problem"]) for r in rows if not r["ok"]})
    seconds = time.perf_counter() - started
    console.print(_table(rows))
    which = SETS[args.op]
    special = len({name for name in (r["problem"] for r in rows) if which.parse(name)[2]})
    console.print(
        f"{len({r['problem'] for r in rows})} problems ({special} {which.special}), {len(rows)} results, "
        f"{failed} failures, {seconds:.0f} s"
    )
    if args.json:
        from peftkern import doctor

        header = doctor.report() | {"seconds": round(seconds, 1), "command": vars(args) | {"json": str(args.json)}}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"header": header, "rows": rows, "declined": declined}, indent=1) + "\n")
    return 1 if failed or unusable or not rows or (idle and "all" not in args.backend) else 0


def _say_declined(rows: list[dict], console) -> bool:
    """Says how many problems each back end declined, and why the first; whether one declined all."""
    idle = False
    for backend in dict.fromkeys(r["backend"] for r in rows):
        own = [r for r in rows if r["backend"] == backend]
        reasons = [r["error"] for r in own if r["output"] == DECLINED]
        if reasons:
            console.print(f"{backend}: {len(reasons)} problems declined, the first: {reasons[0]}", style="yellow")
        idle |= len(reasons) == len(own)
    return idle


def chosen(args: argparse.Namespace, target: Target) -> list[str]:
    """Names of the problems that a target is given."""
    which = SETS[args.op]
    if args.problem:
        return [name for name in args.problem if not target.interpreted or which.fits_interpreter(name)]
    dtypes = [d for d in args.dtype if not (target.interpreted and d == "bf16")]
    count = math.ceil(args.problems / INTERPRETED_SHARE) if target.interpreted else args.problems
    if not dtypes:
        return []
    found = names(count, dtypes, args.seed, large=not target.interpreted, op=args.op)
    if target.interpreted:
        found += [
            f"{which.prefix}{dtype}:{args.seed}:{kind}" for kind in which.kinds if kind not in which.heavy
            for dtype in dtypes
        ]  # fmt: skip
    return found


def _run(work: Sequence[tuple[Target, str]], console) -> list[dict]:
    rows: list[dict] = []
    with console.progress(len(work)) as progress:
        for k, (target, name) in enumerate(work):
            progress.say(f"{k + 1} of {len(work)}: {name} on {target.name}")
            with target.active():
                own = check_one(target, name)
            bad = [r for r in own if not r["ok"]]
            if bad:
                console.print(_failure(target, name, bad), style="red")
            rows += own
            progress.advance()
    return rows


def check_one(target: Target, name: str) -> list[dict]:
    """The rows of one problem on one target, whose settings must be active. An exception is a row that fails; one row
    whose output is DECLINED says why the back end does not take the problem."""
    from peftkern.dispatch.choose import Declined
    from peftkern.testing.accuracy import check

    problem = problem_of(target, name)
    head = dict(backend=target.name, problem=name, dtype=short(problem.dtype), adapters=short(problem.adapter_dtype))
    try:
        with Takers() if target.preferred else contextlib.nullcontext(Takers()) as mode:
            results = check(problem, target.device)
        if target.preferred and not any(choice.backend == target.preferred for choice in mode.taken):
            declined = mode.taken[0].declined.items() if mode.taken else [(target.preferred, "no op was called")]
            raise Declined("; ".join(f"{name}: {why}" for name, why in declined))
    except Declined as error:
        return [head | dict(output=DECLINED, ratio=None, ok=True, error=str(error).rpartition("]: ")[2])]
    except Exception as error:
        line = (str(error).splitlines() or [""])[0]
        return [head | dict(output="call", ratio=None, ok=False, error=f"{type(error).__name__}: {line}")]
    return [
        head | dict(output=r.output, ratio=r.ratio if math.isfinite(r.ratio) else None, ok=bool(r.ok), error=None)
        for r in results
    ]


class Takers(TorchDispatchMode):
    """Who takes the ops inside: ``taken`` holds a ``Choice`` for each of ours that is called, backward included."""

    def __init__(self) -> None:
        super().__init__()
        self.taken: list = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        from peftkern.dispatch import choose, registry

        namespace, _, name = func.name().partition("::")
        if namespace == "peftkern":
            op = registry.OPS[name]
            self.taken.append(choose.choose(op.describe(op.arguments(*args)), current()))
        return func(*args, **kwargs or {})


def problem_of(target: Target, name: str):
    """The problem of that name, within the limits of a target that is interpreted."""
    return named(name, **(set_of(name).limits if target.interpreted else {}))


def _failure(target: Target, name: str, bad: list[dict]) -> str:
    settings = " ".join(f"{k}={v}" for k, v in target.environment.items())
    what = ", ".join(r["error"] or f"{r['output']} {'not finite' if r['ratio'] is None else format(r['ratio'], '.2f')}"
                     for r in bad)  # fmt: skip
    backend, *base = target.name.split(", ")
    op = set_of(name).op
    again = f"peftkern verify{'' if op == 'lora_linear' else f' --op {op}'} --problem {name} --backend {backend}"
    again += f" --cpu-base {base[0]}" if backend == "cpu" else ""
    again += f" --device {target.device}" if target.device != "cpu" else ""
    return f"FAILED {name} [{settings}]: {what}\n  {problem_of(target, name)}\n  again: {again}"


def _table(rows: list[dict]) -> Table:
    # dA0, dA1, ...: one column for the gradients of all adapters.
    def kind(row: dict) -> str:
        return row["output"].rstrip("0123456789")

    outputs = list(dict.fromkeys(map(kind, rows)))
    columns = ("back end", "dtype", "prob-\nlems", *(o.replace("_", "\n") for o in outputs))
    table = Table("worst error over its bound (1 is the limit)", columns, left=columns[:1])
    for backend in dict.fromkeys(r["backend"] for r in rows):
        for dtype in dict.fromkeys(r["dtype"] for r in rows if r["backend"] == backend):
            own = [r for r in rows if r["backend"] == backend and r["dtype"] == dtype]
            cells = []
            for output in outputs:
                mine = [r for r in own if kind(r) == output]
                worst = max((math.inf if r["ratio"] is None else r["ratio"] for r in mine), default=None)
                good = all(r["ok"] for r in mine)
                cells.append(Cell("" if worst is None else f"{worst:.2f}", "" if good else "bold red"))
            table.add(backend, dtype, len({r["problem"] for r in own}), *cells)
    return table


if __name__ == "__main__":
    sys.exit(main())
