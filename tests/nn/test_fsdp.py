"""LoRALinear inside FSDP1 and FSDP2 runs fused and trains to what it trains to alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("torch.distributed.fsdp", reason="torch was built without distributed")


def test_trains_as_it_does_alone():
    worker = Path(__file__).with_name("fsdp_worker.py")
    done = subprocess.run([sys.executable, "-W", "ignore", worker], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    runs = json.loads(done.stdout)
    alone = runs.pop("alone")
    assert alone["losses"][-1] < alone["losses"][0] and set(runs) == {"whole", "apart", "fsdp2"}
    for name, run in runs.items():
        assert run["fused"] == 9, f"{name}: 3 steps of 3 layers"
        assert run["losses"] == pytest.approx(alone["losses"]), name
        assert set(run["parameters"]) == set(alone["parameters"])
        for parameter, value in alone["parameters"].items():
            torch.testing.assert_close(run["parameters"][parameter], value, msg=f"{name}: {parameter}")
    for name in ("whole", "apart"):
        error, merged = runs[name]["merge"]
        assert merged and error < 1e-5, name
