"""``peftkern bench``: time an op, or the layers of methods, against alternatives, print a table, write JSON and plots."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from peftkern.problem import DTYPES
from peftkern.screen import Console, Table

from . import methods
from .core import gpu, machine, populations
from .core.bench import Bench
from .core.case import PASSES, Case
from .core.presets import PRESET_DTYPES, Choice
from .core.result import write
from .measure import interference
from .measure.device_timing import CudaClock
from .measure.rates import fma_peaks
from .measure.runner import Runner, Settings, blocks
from .measure.timing import copy_bandwidth
from .peers.candidates import NOT_HERE
from .registry import OPS
from .tables import device as device_tables
from .tables import method_times, plots, terminal

# Since 2 floors are of the machine, not of the frozen linear.
SCHEMA = 2
SECONDS = {"quick": 1.5, "full": 3.0, "gpu": 8.0}
LIMITS = {"quick": 2.0, "full": 4.0, "gpu": 4.0}
EPILOG = """Each row compares with a frozen nn.Linear timed in the same interleaved run. fwd is the forward part of a
training step, fwd_bwd the whole step (gradients of x and the adapters). Provider names: {providers}.
"""
# FLOPs per second by device, and for how many seconds that guess counts: for the time left.
RATE = {"cpu": 1e11, "cuda": 3e14}
PRIOR = 5.0
# Options of ops with many adapters, and the field of a Choice that each is.
OPTIONS = {
    "--adapters": "counts", "--mix": "mixes", "--base-share": "base_shares", "--ranks": "rank_kinds",
}  # fmt: skip


def _shape(text: str) -> tuple[int, int, int]:
    parts = tuple(int(p) for p in text.lower().replace("x", ",").split(","))
    if len(parts) != 3 or min(parts) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not M,K,N")
    return parts


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    names = sorted({name for bench in OPS.values() for name in bench.providers})
    p = argparse.ArgumentParser(
        prog="peftkern bench", description=__doc__.strip(), epilog=EPILOG.format(providers=", ".join(names))
    )
    p.add_argument("--op", choices=sorted(OPS), default="lora_linear")
    p.add_argument(
        "--methods", nargs="*", metavar="NAME",
        help="instead of an op, the layers of these methods, or of all: the library's own beside the accelerated one",
    )  # fmt: skip
    p.add_argument(
        "--preset",
        choices=tuple(PRESET_DTYPES),
        default="quick",
        help="quick: a minute; full: 10 to 15 minutes; gpu: what a GPU is judged on, a few minutes",
    )
    p.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if torch sees one")
    p.add_argument("--dtype", nargs="+", choices=sorted(DTYPES), help="dtypes of x and weight")
    p.add_argument("--shape", nargs="+", type=_shape, metavar="M,K,N", help="rows, in_features, out_features")
    p.add_argument("--rank", nargs="+", type=int, metavar="R")
    p.add_argument("--dropout", nargs="+", type=float, metavar="P")
    p.add_argument("--adapter-dtype", nargs="+", choices=("same", *sorted(DTYPES)))
    many = p.add_argument_group("ops with many adapters")
    many.add_argument("--adapters", nargs="+", type=int, dest="counts", metavar="N", help="how many in a batch")
    many.add_argument("--mix", nargs="+", choices=populations.MIXES, dest="mixes", help="how rows choose them")
    many.add_argument(
        "--base-share", nargs="+", type=float, dest="base_shares", metavar="P", help="of rows that take no adapter"
    )
    many.add_argument(
        "--ranks", nargs="+", choices=populations.RANKS, dest="rank_kinds", help="all alike, or parts of R"
    )
    p.add_argument("--provider", nargs="+", choices=names, help="only these, for every case, beside the frozen linear")
    p.add_argument("--seconds", type=float, help="time per shape, dtype and rank, all providers together")
    p.add_argument("--repeats", type=int, default=5, help="at least so many rounds, whatever they take (default 5)")
    p.add_argument("--limit", type=float, help="skip what takes longer than this many seconds a step")
    p.add_argument("--threads", type=int, help="torch.set_num_threads")
    p.add_argument("--memory", action="store_true", help="also measure the peak memory of a step")
    p.add_argument(
        "--graph", action="store_true", help="on a GPU: time CUDA graphs (decoding always is, as far as it can be)"
    )
    p.add_argument("--no-gate", action="store_true", help="do not check results before timing them")
    p.add_argument("--json", type=Path, metavar="FILE", help="write header and rows; updated after every block")
    p.add_argument("--plot", type=Path, metavar="DIR", help="write plots as PNG")
    p.add_argument(
        "--rerun", type=Path, metavar="FILE",
        help="time the rows of FILE that lose to addmm by over 5%% three times again, and add that to FILE",
    )  # fmt: skip
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Exit code 1 if peftkern could not be measured somewhere (a failure or a wrong result)."""
    args = parser().parse_args(argv)
    console = Console()
    if args.plot:
        import matplotlib  # noqa: F401  (absent: say so now, not after the measurement)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.rerun:
        from .rerun import rerun

        return rerun(args.rerun, console, repeats=max(args.repeats, 7))
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    reason = not_measured(device, args)
    if reason:
        console.print(f"nothing is measured: {reason}", style="red")
        return 2
    work = [(bench, bench.cases(args.preset, device, choice)) for bench, choice in _benches(args)]
    cases = [case for _, own in work for case in own]
    if not cases:
        console.print("nothing to measure: no case has these dtypes and adapter dtypes", style="red")
        return 2
    clock, bandwidth, peaks = rates(device, cases)
    op = args.op if args.methods is None else "methods"
    header = machine.header(device, bandwidth, peaks) | {"preset": args.preset, "op": op}
    result = {"schema": SCHEMA, "header": header, "rows": [], "reruns": []}
    settings = Settings(
        preset=args.preset, seconds=args.seconds or SECONDS[args.preset], bandwidth=bandwidth,
        limit=args.limit or LIMITS[args.preset], min_repeats=args.repeats, max_repeats=max(60, args.repeats),
        cache=header["cache_bytes"], memory=args.memory or device == "cuda", providers=tuple(args.provider or ()),
        gate=not args.no_gate, clock=clock, peaks=peaks, graph=args.graph,
    )  # fmt: skip
    describe(header, console)
    started = time.perf_counter()
    for rows in _progress([(Runner(bench, settings), own) for bench, own in work], console):
        result["rows"] += rows
        header["seconds"] = round(time.perf_counter() - started, 1)
        if device == "cuda":
            header["gpu"]["smi_after"] = gpu.smi()
        if args.json:
            write(args.json, result)
    for table in _tables(result, work[0][0], device):
        console.print(table)
    words, busy = interference.words(result)
    console.print(f"{len(result['rows'])} rows in {header['seconds']:.0f} s; {words}", style="yellow" if busy else "")
    if args.plot:
        for file in _plots(result, work[0][0], args.plot):
            console.print(f"wrote {file}")
    return failures(result["rows"], work[0][0], console)


def not_measured(device: str, args: argparse.Namespace) -> str | None:
    """Why there is nothing to measure, or None."""
    if device == "cuda":
        return gpu.unavailable()
    if args.preset == "gpu" or args.graph:
        why = gpu.unavailable()
        return ("--graph" if args.graph else "--preset gpu") + " is for --device cuda" + (f", and {why}" if why else "")
    return None


def rates(device: str, cases: list[Case]) -> tuple[CudaClock | None, float, dict[str, float]]:
    """What measures, and the rates that floors are made from: bytes of a copy, and FLOPs by dtype (core/floor.py)."""
    dtypes = dict.fromkeys(case.dtype for case in cases)
    if device != "cuda":
        # fp32 always: half precision may be compared with the frozen fp32 linear.
        return None, copy_bandwidth(device), fma_peaks([torch.float32, *dtypes], torch.get_num_threads())
    clock = CudaClock(machine.cache_bytes(device))
    return clock, gpu.copy_rate(clock), gpu.product_rates(clock, dtypes)


def _benches(args: argparse.Namespace) -> list[tuple[Bench, Choice]]:
    # What is measured, and what was asked for of it.
    choice = _choice(args, OPS[args.op])
    if args.methods is None:
        return [(OPS[args.op], choice)]
    if args.provider or args.adapter_dtype:
        parser().error("--provider and --adapter-dtype mean nothing to --methods")
    try:
        return methods.benches(args.methods, choice)
    except ValueError as error:
        parser().error(str(error))


def _tables(result: dict, bench: Bench, device: str) -> list[Table]:
    if result["header"]["op"] == "methods":
        return method_times.tables(result["rows"])
    return (device_tables if device == "cuda" else terminal).tables(result["rows"], bench)


def _plots(result: dict, bench: Bench, folder: Path) -> list[Path]:
    return (
        method_times.plot(result, folder) if result["header"]["op"] == "methods" else plots.plot(result, bench, folder)
    )


def _choice(args: argparse.Namespace, bench: Bench) -> Choice:
    given = {name: getattr(args, name) for name in OPTIONS.values() if getattr(args, name) is not None}
    for option, name in OPTIONS.items():
        if name in given and not bench.many:
            parser().error(f"{option} means nothing to {bench.name}")
    unknown = set(args.provider or ()) - set(bench.providers)
    if unknown:
        parser().error(f"{bench.name} has no provider {', '.join(sorted(unknown))}")
    if any(n < 1 for n in given.get("counts", ())) or any(not 0 <= p <= 1 for p in given.get("base_shares", ())):
        parser().error("--adapters must be at least 1 and --base-share from 0 to 1")
    return Choice(args.dtype, args.shape, args.rank, args.dropout, args.adapter_dtype, **given)


def _expected(block: list[Case], runner: Runner) -> float:
    """Seconds that a block will take, roughly: what a log starts from before the first block is done."""
    s, case = runner.settings, block[0]
    floors = [runner.bench.floor(case, which) for which in PASSES if which in case.passes]
    step = max(f.base_flops + f.branch_flops for f in floors) / RATE[case.device]
    steps = sum(len(s.providers or runner.bench.plan(c, s.preset)) for c in block) + 2
    return 1.0 + max(s.seconds, (s.min_repeats + 2) * steps * step)


def _progress(work: list[tuple[Runner, list[Case]]], console: Console):
    expected = [_expected(block, runner) for runner, cases in work for block in blocks(cases)]
    done = 0

    def say(what: str, share: float) -> None:
        progress.say(f"{done + 1} of {len(expected)}: {what}", share * expected[done])

    with console.progress(sum(expected), prior=PRIOR) as progress:
        for runner, cases in work:
            for rows in runner.run(cases, say):
                progress.advance(expected[done])
                done += 1
                yield rows


def describe(header: dict, console: Console) -> None:
    """One line on what is measured on."""
    versions, cpu = header["versions"], header["cpu"]
    isa = header["gpu"]["arch"] if header["gpu"] else cpu["torch_isa"]
    peaks = [f"{name} peak {rate:.0f} GFLOP/s, " for name, rate in header["fma_gflop_per_s"].items()]
    peaks += [f"{name} product {rate:.0f} TFLOP/s, " for name, rate in header["product_tflop_per_s"].items()]
    console.print(
        f"{header['device']} ({isa}), {header['threads']} threads, copy {header['copy_gb_per_s']:.0f} GB/s, "
        f"{''.join(peaks)}torch {versions['torch']}, peft {versions['peft']}, peftkern {versions['peftkern']}"
    )
    if header["load"] is not None and header["load"] > interference.BUSY_LOAD:
        console.print(f"this machine is busy (load {header['load']:.1f}): the times will be poor", style="yellow")
    if held := machine.held_back(header):
        console.print(f"{held}: no result of this machine", style="yellow")


def failures(rows: list[dict], bench: Bench, console) -> int:
    """1 if a provider broke or was wrong (one that is slow, or not for this machine, is no failure), else 0."""
    bad = {r["skipped"] for r in rows if r["skipped"] and not r["skipped"].startswith(("hopelessly slow", NOT_HERE))}
    missing = {reason for p in bench.providers.values() if (reason := p.missing())}
    for reason in sorted(bad & missing):
        console.print(f"left out: {reason}")
    bad -= missing
    for reason in sorted(bad):
        console.print(f"not measured: {reason}", style="red")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
