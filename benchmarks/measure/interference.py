"""How busy a machine is with other things while something is timed: a time taken beside others is no verdict."""

from __future__ import annotations

import os
from pathlib import Path

STAT = Path("/proc/stat")
# Cores, on the average of a run, from which its times are called poor.
BUSY_CORES = 0.25
# Load average from which a run should not start.
BUSY_LOAD = 0.5


def _busy_seconds() -> float | None:
    """Seconds that the processors this process may use have worked, whoever for; what a hypervisor took counts. None
    where the system does not say."""
    try:
        usable = {f"cpu{n}" for n in os.sched_getaffinity(0)}
        fields = [line.split() for line in STAT.read_text().splitlines() if line.startswith("cpu")]
    except (OSError, AttributeError):
        return None
    # user nice system idle iowait irq softirq steal
    ticks = [sum(int(f[i]) for i in (1, 2, 3, 6, 7, 8)) for f in fields if f[0] in usable]
    return sum(ticks) / os.sysconf("SC_CLK_TCK") if ticks else None


class Meter:
    """Counts from its making, or the last ``restart``, on."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Forgets what was."""
        times = os.times()
        self._wall, self._own, self._all = times.elapsed, sum(times[:4]), _busy_seconds()

    def cores(self) -> float | None:
        """Cores that others used on average; None where it is not known. Exact to a clock tick, a hundredth of a second."""
        now, busy = os.times(), _busy_seconds()
        if busy is None or self._all is None or now.elapsed <= self._wall:
            return None
        others = busy - self._all - (sum(now[:4]) - self._own)
        return round(max(others, 0.0) / (now.elapsed - self._wall), 2)


def words(result: dict) -> tuple[str, bool]:
    """(what a result says of the machine's other work, whether that spoils its times)."""
    found = [row["others_cores"] for row in result["rows"] if row.get("others_cores") is not None]
    if found:
        mean, worst = sum(found) / len(found), max(found)
        text = f"other processes used {mean:.2f} cores meanwhile, {worst:.2f} at worst"
        return text, mean > BUSY_CORES or worst > 4 * BUSY_CORES
    load = result["header"].get("load")
    if load is None:
        return "other work was not measured", False
    return f"load average {load:.2f} before the run", load > BUSY_LOAD
