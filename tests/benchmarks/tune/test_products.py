"""The base products of a CPU's table: what is planned, what is given up, and a table that is read as it was written."""

from __future__ import annotations

import itertools
import json

import pytest
import torch

from peftkern.backends.cpu import call as cpu_call
from peftkern.backends.cpu import native as cpu_native
from peftkern.benchmarks.tune import main as tune
from peftkern.benchmarks.tune import products
from peftkern.benchmarks.tune.products import Job
from peftkern.dispatch import cpu_table
from peftkern.dispatch.cpu_table import Product

pytestmark = pytest.mark.skipif(
    cpu_call.unavailable is not None or not cpu_native.model()[0], reason="no native calls here, or no x86"
)


@pytest.fixture
def small(monkeypatch):
    """Two small shapes and no time for rounds."""
    monkeypatch.setattr(products, "SHAPES", ((48, 40), (40, 24)))
    monkeypatch.setattr(products, "ROWS", (1, 16, 100))
    monkeypatch.setattr(products, "BUDGET", 0.0)
    monkeypatch.setattr(products.machine, "cache_bytes", lambda device: 20_000)


def test_what_users_run_comes_first_and_layers_of_usual_sizes_are_near():
    work = products.planned(["fp32", "bf16", "fp16"])
    assert len(set(work)) == len(work) and work[0] == Job("fp32", "forward", 4096, 4096)
    each = 2 * len(products.SHAPES)
    assert [job.dtype for job in work] == ["fp32"] * each + ["bf16"] * each + ["fp16"] * each
    data = [
        {"dtype": j.dtype, "pass": j.which, "D": j.D, "C": j.C, "M": j.rows(), "us": {"few": [1.0] * len(j.rows())}}
        for j in work
    ]
    table = cpu_table.Table({"schema": 1, "meta": {}, "rows": data}, "x")
    small = itertools.combinations_with_replacement((16, 24, 64, 65, 200, 256, 384, 768, 1024, 1025, 1536, 2048), 2)
    for D, C in ((4096, 4096), (14336, 4096), (3072, 8192), (8192, 2048), *small):
        for M in (*range(1, 300, 7), 5000):
            for forward in (True, False):
                for size in ((D, C), (C, D)):
                    assert cpu_table.nearest(table, Product(torch.bfloat16, forward, M, *size)).order, (M, size)


def test_the_table_that_is_written_is_read(small, tmp_path, monkeypatch, capsys):
    asked, forward, backward = [], cpu_call.forward, cpu_call.backward

    def seen(now, a, w, out, product, branch):
        # The whole pass: product and branch.
        whole = product + branch
        assert float((out.float() - whole).abs().max()) < 0.02 * float(whole.abs().max()) < float(branch.abs().max())
        asked.append((a.dtype, a.shape[0], now.cpu_kind, w.data_ptr()))

    def watch_forward(now, threads, x, kind, w, A, B, *rest):
        y = forward(now, threads, x, kind, w, A, B, *rest)
        if y is not None:
            seen(now, x, w, y, x.float() @ w.float().t(), x.float() @ A.t() @ B.t())
        return y

    def watch_backward(now, threads, dy, x, u, h, kind, w, A, B, *rest):
        grads = backward(now, threads, dy, x, u, h, kind, w, A, B, *rest)
        if grads is not None:
            assert all(g is None for g in grads[1:])
            seen(now, dy, w, grads[0], dy.float() @ w.float(), dy.float() @ B @ A)
        return grads

    monkeypatch.setattr(cpu_call, "forward", watch_forward)
    monkeypatch.setattr(cpu_call, "backward", watch_backward)
    file = tmp_path / "cpu.json"
    assert tune.main(["--cpu", "--only", "products", "--json", str(file)]) == 0
    assert "12 shapes (12 planned)" in capsys.readouterr().out
    data = json.loads(file.read_text())
    model, level = cpu_table.CpuModel(*cpu_native.model()), cpu_native.level()
    assert data["meta"]["cpu"] == {"vendor": model.vendor, "family": model.family, "models": [model.model] * 2}
    assert {"threads", "load", "versions", "commit", "date", "seconds"} <= set(data["meta"])
    table = cpu_table.Table(data, file.name)
    assert cpu_table.applies(table, level)
    for row in data["rows"]:
        # In half precision the vendor's may be hopeless.
        assert set(row["us"]) - {"vendor", "amx"} in ({"few", "panels"}, {"few", "bf16"}) and row["M"] == [1, 16, 100]
        assert row["us"]["few"][2] is None and None not in row["us"].get("panels", [])
        assert row["dtype"] != "fp32" or None not in row["us"]["vendor"]
    for row in (r for r in data["rows"] if r["dtype"] == "fp32"):
        product = Product(torch.float32, row["pass"] == "forward", 100, row["D"], row["C"])
        order = cpu_table.nearest(table, product).order
        vendor, panels = row["us"]["vendor"][2], row["us"]["panels"][2]
        assert order == (("panels", "vendor") if panels < vendor * cpu_table.WINS else ("vendor", "panels"))
    assert {kind for dtype, _, kind, _ in asked if dtype == torch.float32} == {"vendor", "few", "panels"}
    # With few rows copies of W take turns, with many there is one.
    few = {w for dtype, M, _, w in asked if M == 16 and dtype == torch.float32}
    many = {w for dtype, M, _, w in asked if M == 100 and dtype == torch.float32}
    assert len(few) > len(many) >= 1


def test_what_is_hopeless_is_given_up(small, monkeypatch):
    """A vendor's product ten times as slow, below and from 8 rows on; in fp32 everything is timed."""
    tried: list[tuple[int, str]] = []

    def calls(job, M, weights):
        yield from ((kind, (M, kind)) for kind in ("vendor", "panels"))

    def seconds(call, turn):
        tried.append(call)
        return 1e-5 if call[1] == "panels" else 1e-4

    monkeypatch.setattr(products, "calls_of", calls)
    monkeypatch.setattr(products, "seconds", seconds)
    rows = (4, 8, 16, 32, 64)
    assert products.measure(Job("bf16", "dx", 48, 40), rows)["us"] == {"panels": [10.0] * 5}
    assert [M for M, kind in tried if kind == "vendor"] == [4, 4, 8, 8, 16, 16]
    tried.clear()
    # What disturbs one number of rows costs no other its place.
    slow = {(8, "vendor"), (32, "vendor")}
    monkeypatch.setattr(products, "seconds", lambda call, turn: 1e-4 if call in slow else 1e-5)
    assert products.measure(Job("bf16", "dx", 48, 40), rows)["us"]["vendor"] == [10.0, None, 10.0, None, 10.0]
    monkeypatch.setattr(products, "seconds", seconds)
    assert products.measure(Job("fp32", "dx", 48, 40), rows)["us"] == {"vendor": [100.0] * 5, "panels": [10.0] * 5}
    assert all(tried.count((M, kind)) == 1 + products.FEWEST for M in rows for kind in ("vendor", "panels"))


def test_an_end_in_time(small, tmp_path, capsys):
    assert tune.main(["--cpu", "--only", "products", "--seconds", "0", "--json", str(tmp_path / "x.json")]) == 1
    assert "0 shapes (12 planned)" in capsys.readouterr().out
    assert json.loads((tmp_path / "x.json").read_text())["rows"] == []
