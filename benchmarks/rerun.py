"""``peftkern bench --rerun FILE``: the rows that lose to the addmm_ function by over 5 %, three times again.

One run of a noisy machine is no verdict on a single row. The median of the three ratios is added to the file, under
``reruns``, and is what judge/lora_linear.py uses; the rows themselves stay as they were measured.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path

from peftkern.problem import DTYPES
from peftkern.screen import Console

from .core.case import Case
from .core.result import write
from .judge.figures import ADDMM, KEY, OURS
from .judge.lora_linear import RERUN_ABOVE, against_addmm
from .measure.runner import Runner, Settings
from .registry import OPS

TIMES = 3


def rerun(file: Path, console: Console, *, repeats: int) -> int:
    """Rerun, print and write. Exit code 1 if a median still is above 1.05."""
    result = json.loads(file.read_text())
    header = result["header"]
    settings = Settings(
        preset=header["preset"], seconds=2.0, bandwidth=header["copy_gb_per_s"] * 1e9, min_repeats=repeats,
        cache=header["cache_bytes"], providers=(ADDMM, OURS), gate=False, limit=30.0,
    )  # fmt: skip
    again: dict[tuple, dict] = {tuple(r[name] for name in KEY): r for r in result["reruns"]}
    losers = [k for k, ratio in against_addmm(result["rows"]).items() if ratio > RERUN_ABOVE and k not in again]
    with console.progress(TIMES * len(losers)) as progress:
        for k in losers:
            row = dict(zip(KEY, k))
            case = Case(
                row["op"], row["device"], DTYPES[row["dtype"]], DTYPES[row["adapter_dtype"]],
                row["M"], row["K"], row["N"], row["R"], row["dropout"],
            )  # fmt: skip
            runner, ratios = Runner(OPS[row["op"]], settings), []
            for _ in range(TIMES):
                progress.say(str(case))
                ratios.append(against_addmm(next(runner.run([case]))).get(k))
                progress.advance()
            ratios = [round(r, 4) for r in ratios if r is not None]
            if not ratios:
                console.print(f"{case}: could not be measured", style="red")
                continue
            again[k] = row | {"ratios": ratios, "median": statistics.median(ratios)}
            console.print(f"{case}: {', '.join(f'{r:.3f}' for r in ratios)} -> {again[k]['median']:.3f}")
            result["reruns"] = list(again.values())
            write(file, result)
    still = [r for r in again.values() if r["median"] > RERUN_ABOVE]
    console.print(f"{len(losers)} rows run again; {len(still)} of {len(again)} remain over 5 %")
    return 1 if still else 0
