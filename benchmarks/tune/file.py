"""The file that a tuner writes: a head that says what was measured on, and rows."""

from __future__ import annotations

import datetime
import json
import time
from pathlib import Path
from typing import Any

from peftkern import doctor

from ..core import machine


def meta(started: float, **own: Any) -> dict[str, Any]:
    """``own`` and what every table says of its making; ``started`` by ``time.perf_counter``."""
    return own | {
        "versions": doctor.versions(),
        "commit": machine.commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(time.perf_counter() - started, 1),
    }


def write(file: Path, data: dict) -> None:
    """One row a line, so that a diff of two tables is readable."""
    head = json.dumps({k: v for k, v in data.items() if k != "rows"}, indent=1)[:-2]
    lines = ",\n  ".join(json.dumps(row) for row in data["rows"])
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(file.name + ".tmp")
    temporary.write_text(f'{head},\n "rows": [{chr(10) + "  " + lines + chr(10) + " " if lines else ""}]\n}}\n')
    temporary.replace(file)
