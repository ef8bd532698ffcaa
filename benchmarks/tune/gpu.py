"""``peftkern tune``: which candidate is fastest for each problem on this GPU (``--cpu``: on this CPU).

Writes the table that peftkern/dispatch/tuned.py reads, into the user's folder or to ``--json FILE``. Inputs take turns, so that
none is found in a cache; candidates take turns within a run; a candidate whose result differs from the default's is not timed.
Problems come in order of importance, and what does not fit into ``--seconds`` is left out and counted.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from peftkern import doctor
from peftkern.dispatch import tuned
from peftkern.screen import Console
from peftkern.settings import OWN_TABLES

from ..core import machine
from ..measure.timing import quiet
from .calls import call_of, make_inputs
from .file import meta, write
from .plan import COMPOSITION, OPS, Job, candidates, copies, fastest, jobs

# Longer than it takes to enqueue a call: the GPU then never waits for the host between the two events.
SLEEP_CYCLES = 1_000_000
# Of the largest value; halves are rounded to 2^-9 of a value, and the candidates round at different places.
TOLERANCE = 0.03


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    p = argparse.ArgumentParser(
        prog="peftkern tune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--op", nargs="+", choices=sorted(OPS), default=sorted(OPS))
    p.add_argument("--dtype", nargs="+", choices=("bf16", "fp16"), default=["bf16", "fp16"])
    p.add_argument("--rank", nargs="+", type=int, metavar="R", default=[16, 64, 8, 32])
    p.add_argument("--seconds", type=float, default=600.0, help="stop after so long (default 600)")
    p.add_argument("--repeats", type=int, default=12, help="rounds of each problem (default 12)")
    p.add_argument("--json", type=Path, metavar="FILE", help="default: the user's table of this GPU")
    p.add_argument("--dry-run", action="store_true", help="say what would be measured; no GPU is needed")
    p.add_argument("--arch", type=int, default=90, help="with --dry-run: 90 for sm_90 (default)")
    return p


def planned(args) -> list[Job]:
    """The jobs of all ops, each op's spread evenly over the whole: a run that stops early has measured some of each."""
    lists = [jobs(op, dtypes=args.dtype, ranks=args.rank) for op in args.op]
    spread = [(i / len(part), k, job) for k, part in enumerate(lists) for i, job in enumerate(part)]
    return [job for _, _, job in sorted(spread, key=lambda entry: entry[:2])]


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Exit code 1 without a CUDA device, or if nothing was measured."""
    args = parser().parse_args(argv)
    work = planned(args)
    if args.dry_run:
        count = sum(len(candidates(job, args.arch)) for job in work)
        print(f"{len(work)} problems, {count} candidates, for sm_{args.arch}; the first: {work[0]}")
        if args.json:
            write(args.json, {"schema": tuned.SCHEMA, "meta": {"dry_run": True, "planned": len(work)}, "rows": []})
        return 0
    if not torch.cuda.is_available():
        print(
            "tune: torch sees no CUDA device (--dry-run needs none, --cpu tunes this CPU)",
            file=sys.stderr,
        )
        return 1
    file = args.json or Path(OWN_TABLES) / tuned.file_name(torch.cuda.get_device_name())
    started, rows, failed = time.perf_counter(), [], []
    console = Console()
    # What ends the run is the time or the list, whichever is over first.
    with console.progress(len(work), limit=args.seconds) as progress:
        for k, job in enumerate(work):
            if time.perf_counter() - started > args.seconds:
                break
            progress.say(f"{k + 1} of {len(work)}: {job.op} {job.dtype} {job.M}x{job.N}x{job.K} R={job.R}")
            try:
                rows.append(measure(job, args.repeats))
            except Exception as error:  # one problem that fails must not end the run
                failed.append(f"{job}: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
                console.print(f"not measured: {failed[-1]}", style="red")
            torch.cuda.empty_cache()
            progress.advance()
            if len(rows) % 5 == 1:
                write(file, table(rows, failed, len(work), started))
    write(file, table(rows, failed, len(work), started))
    print(f"{len(rows)} of {len(work)} problems in {time.perf_counter() - started:.0f} s, {len(failed)} failed: {file}")
    return 1 if failed or not rows else 0


def table(rows: list[dict], failed: list[str], planned: int, started: float) -> dict:
    """The content of the file."""
    head = meta(
        started, gpu=doctor.gpu(), driver=driver(), cuda=torch.version.cuda, planned=planned, measured=len(rows),
        failed=failed,
    )  # fmt: skip
    return {"schema": tuned.SCHEMA, "meta": head, "rows": rows}


def driver() -> str | None:
    """Version of the NVIDIA driver."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[0].strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def measure(job: Job, repeats: int) -> dict:
    """The row of one problem."""
    major, minor = torch.cuda.get_device_capability()
    arch = major * 10 + minor
    count = copies(job, machine.cache_bytes("cuda"))
    inputs = make_inputs(job, count, "cuda")
    calls, not_run, expected = {}, {}, None
    found = candidates(job, arch)
    for candidate in found:
        call, reason = call_of(candidate, inputs, arch)
        if reason is None:
            reason, result = _first(call, inputs.arguments[0][0] if job.op == "sgmv_add" else None)
            if reason is None and candidate.name != COMPOSITION:
                if expected is None:
                    expected = result
                reason = differs(result, expected)
        if reason is None:
            calls[candidate.label] = call
        else:
            not_run[candidate.label] = reason
    with torch.no_grad():
        times = interleaved(calls, count, repeats)
    return row(job, found, times, not_run, count)


def _first(call: Callable[[int], object], changed: Tensor | None) -> tuple[str | None, list[Tensor]]:
    # Compiles what has to be compiled. An op that changes a tensor in place returns nothing: that tensor is its result.
    try:
        with torch.no_grad():
            before = None if changed is None else changed.clone()
            result = call(0)
            if before is not None:
                result = changed.clone()
                changed.copy_(before)
    except Exception as error:
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}", []
    parts = result if isinstance(result, tuple) else (result,)
    return None, [t.float() for t in parts if isinstance(t, Tensor) and t.numel()]


def differs(result: list[Tensor], expected: list[Tensor]) -> str | None:
    """Why a candidate's result is not the default's, or None. Accuracy proper is ``peftkern verify``'s business."""
    if len(result) != len(expected):
        return f"has {len(result)} results, the default {len(expected)}"
    for i, (a, b) in enumerate(zip(result, expected)):
        error = (a - b).abs().max().item() / max(b.abs().max().item(), 1e-30)
        if not error <= TOLERANCE:
            return f"result {i} differs from the default's by {error:.2g} of its largest value"
    return None


def interleaved(calls: dict[str, Callable[[int], object]], count: int, repeats: int) -> dict[str, list[float]]:
    """Microseconds on the GPU of each call, ``repeats`` rounds; every call takes the copy that was used longest ago."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    names, turn = list(calls), 0
    with quiet():
        for done in range(repeats + 1):
            marks = []
            for k in range(len(names)):
                name = names[(k + done) % len(names)]
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                torch.cuda._sleep(SLEEP_CYCLES)
                start.record()
                calls[name](turn % count)
                end.record()
                marks.append((name, start, end))
                turn += 1
            torch.cuda.synchronize()
            # The first round warms up clocks and allocators.
            for name, start, end in marks if done else ():
                times[name].append(start.elapsed_time(end) * 1e3)
    return times


def row(job: Job, found, times: dict[str, list[float]], not_run: dict[str, str], count: int) -> dict:
    """Medians, and which candidate is fastest. Raises ValueError if none that may be chosen was measured."""
    us = {name: round(statistics.median(t), 2) for name, t in times.items()}
    quartiles = {
        name: [round(q, 2) for q in statistics.quantiles(t, n=4)[::2]] for name, t in times.items() if len(t) > 1
    }
    eligible = [c.label for c in found if c.eligible and c.label in us]
    best = next(c for c in found if c.label == fastest(us, eligible))
    return dataclasses.asdict(job) | {
        "choice": best.name,
        "config": dataclasses.asdict(best.config) if best.config else None,
        "us": us,
        "quartiles_us": quartiles,
        "eligible": eligible,
        "over_composition": round(us[best.label] / us[COMPOSITION], 4) if COMPOSITION in us else None,
        "copies": count,
        "repeats": max(map(len, times.values())),
        "not_run": not_run,
    }


if __name__ == "__main__":
    sys.exit(main())
