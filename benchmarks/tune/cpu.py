"""``peftkern tune --cpu``: what this CPU can do, whose base product is fastest on it, and from where on small calls gain.

Writes the table that peftkern/dispatch/cpu_table.py reads, into the user's folder (``peftkern doctor`` names the table in use)
or to ``--json FILE``. Run it on an idle machine: a busy one favours whoever needs less memory.

- rates: multiply-adds in registers, a copy in memory.
- least: the least work that is worth our code, beside the libraries that are installed.
- products: whose base product is fastest, by dtype, pass and shape; what does not fit into ``--seconds`` is left out.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from peftkern.backends.cpu import call as cpu_call
from peftkern.backends.cpu import native as cpu_native
from peftkern.dispatch import cpu_table
from peftkern.problem import DTYPES
from peftkern.settings import OWN_TABLES, TABLES, current

from ..measure.rates import cpu_rates
from ..measure.timing import quiet
from . import products
from .file import meta, write
from .least import measure as measure_least

PARTS = ("rates", "least", "products")


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    p = argparse.ArgumentParser(
        prog="peftkern tune --cpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--dtype", nargs="+", choices=tuple(DTYPES), default=["fp32", "bf16", "fp16"])
    p.add_argument("--seconds", type=float, default=270.0, help="start no further shape after so long (default 270)")
    p.add_argument(
        "--only",
        nargs="+",
        choices=PARTS,
        default=PARTS,
        help="these parts; the others are kept as FILE, or the package, has them",
    )
    p.add_argument("--names", nargs="+", metavar="NAME", help="of the limits of small calls, only these")
    p.add_argument("--json", type=Path, metavar="FILE", help="default: the user's table of this CPU model")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Exit code 1 where the C++ kernels were not built or the CPU can't be told, or if nothing was measured."""
    args = parser().parse_args(argv)
    if cpu_call.unavailable or not cpu_native.model()[0]:
        print(f"tune: {cpu_call.unavailable or 'this CPU does not say which model it is'}", file=sys.stderr)
        return 1
    cpu_native.use_isa(current().cpu_isa)
    cpu, level = cpu_table.CpuModel(*cpu_native.model()), cpu_native.level()
    load, started = os.getloadavg()[0], time.perf_counter()
    if load > 0.5:
        print(f"this machine is busy (load {load:.1f}): the table will be poor", file=sys.stderr)
    file = args.json or Path(OWN_TABLES) / cpu_table.file_name(cpu, level.isa)
    work = products.planned(args.dtype) if "products" in args.only else []
    data, parts = kept(file, cpu, level)
    others = 0

    def save() -> None:
        head = meta(
            started, cpu={"vendor": cpu.vendor, "family": cpu.family, "models": [cpu.model, cpu.model]},
            level=level._asdict(), threads=torch.get_num_threads(), load=round(load, 2), planned=others + len(work),
            measured=len(data["rows"]),
        )  # fmt: skip
        head["parts"] = parts | dict.fromkeys(args.only, head["date"])
        write(file, {"schema": cpu_table.SCHEMA, "meta": head} | data)

    with quiet():
        if "rates" in args.only:
            data["rates"] = cpu_rates()
        if "least" in args.only:
            data["least"] = dict(sorted((data["least"] | measure_least(args.names)).items()))
        if "products" in args.only:
            # Those of other dtypes are kept.
            data["rows"] = [row for row in data["rows"] if row["dtype"] not in args.dtype]
            others = len(data["rows"])
        for done, job in enumerate(work):
            spent = time.perf_counter() - started
            if spent > args.seconds:
                break
            print(f"{done + 1}/{len(work)}  {spent:4.0f} s  {job.dtype} {job.which} {job.D}x{job.C}", file=sys.stderr)
            with torch.no_grad():
                data["rows"].append(products.measure(job))
            save()  # what was done is kept
    save()
    print(f"{len(data['rows'])} shapes ({others + len(work)} planned) in {time.perf_counter() - started:.0f} s: {file}")
    return 0 if data["rows"] or not work else 1


def kept(file: Path, cpu: cpu_table.CpuModel, level: cpu_table.Level) -> tuple[dict, dict[str, str]]:
    """What the file, or else the package's table, has measured of this CPU already; and when, by part."""
    found = next((f for f in (file, Path(TABLES) / file.name) if f.is_file() and _speaks(f, cpu, level)), None)
    old = {} if found is None else json.loads(found.read_text())
    data = {"rates": old.get("rates", {}), "least": old.get("least", {}), "rows": old.get("rows", [])}
    head = old.get("meta", {})
    dates = {part: head["date"] for part, name in zip(PARTS, data, strict=True) if data[name]}
    return data, dates | head.get("parts", {})


def _speaks(file: Path, cpu: cpu_table.CpuModel, level: cpu_table.Level) -> bool:
    table = cpu_table.Table(json.loads(file.read_text()), str(file))
    named = table.meta["cpu"]
    return (named["vendor"], named["family"], *named["models"]) == (*cpu, cpu.model) and cpu_table.applies(table, level)
