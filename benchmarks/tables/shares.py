"""How near times come to what the machine can do, in the cells of tables.

Rows have a floor and both shares where their run measured the peak; results from before do not, and get no such columns.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

FLOOR, SHARES = "floor", "of peak, of copy"
NOTE = (
    "floor: least possible ratio, by FLOPs at the peak or bytes at copy speed, whichever take longer. of peak, of copy: shares"
    " of peftkern's time that either explains."
)


def heads(rows: Iterable[dict], *wanted: str) -> list[str]:
    """Those of FLOOR and SHARES that are wanted, if the peak was measured along with these rows."""
    return list(wanted) if any(row.get("floor_by") for row in rows) else []


def floor(rows: Iterable[dict]) -> str:
    """The least possible ratio, a mean of rows, and which of the floors it is."""
    rows = [row for row in rows if row.get("floor_by") and row["floor_ratio"] is not None]
    bounds = "/".join(dict.fromkeys(row["floor_by"] for row in rows))
    return f"{statistics.fmean(row['floor_ratio'] for row in rows):.3f} {bounds}" if rows else "-"


def share(rows: Iterable[dict], field: str) -> str:
    """A share, a mean of rows, in per cent."""
    found = [value for row in rows if (value := row.get(field)) is not None]
    return f"{statistics.fmean(found):.0%}" if found else "-"


def shares(rows: Sequence[dict]) -> str:
    """Both, in the order of SHARES."""
    return ", ".join(share(rows, field) for field in ("flops_bound_fraction", "bytes_bound_fraction"))


CELLS = {FLOOR: floor, SHARES: shares}


def cells(rows: Sequence[dict], wanted: Iterable[str]) -> list[str]:
    """What stands below ``heads``."""
    return [CELLS[head](rows) for head in wanted]
