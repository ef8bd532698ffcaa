"""Every Python example in README and docs runs, in order, each in its own namespace."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = [
    pytest.param(code, id=f"{path.stem}-{k}")
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    for k, code in enumerate(re.findall(r"^```python\n(.*?)^```", path.read_text(), re.M | re.S))
]


def test_readme_has_an_example_of_each_entry_point():
    text = "".join(param.values[0] for param in EXAMPLES)
    for name in ("lora_linear(", "LoRALinear", "accelerate("):
        assert name in text


@pytest.mark.parametrize("code", EXAMPLES)
def test_example_runs(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "example", "exec"), {"__name__": "example"})
