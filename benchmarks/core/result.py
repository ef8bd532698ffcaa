"""The JSON file of a benchmark run."""

from __future__ import annotations

import json
from pathlib import Path


def write(file: Path, result: dict) -> None:
    """Write the JSON, one row a line so that a diff of two results is readable."""
    head = {k: v for k, v in result.items() if k not in ("rows", "reruns")}
    parts = [json.dumps(head, indent=1)[:-2]]
    for name in ("rows", "reruns"):
        lines = ",\n  ".join(json.dumps(row) for row in result[name])
        parts.append(f' "{name}": [{chr(10) + "  " + lines + chr(10) + " " if lines else ""}]')
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(file.name + ".tmp")
    temporary.write_text(",\n".join(parts) + "\n}\n")
    temporary.replace(file)
