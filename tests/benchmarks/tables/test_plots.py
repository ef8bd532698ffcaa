"""Figures: every dropout has a panel, words fit, and what spoils or is absent is said on the figure itself."""

from __future__ import annotations

import pytest

pytest.importorskip("matplotlib")
from peftkern.benchmarks.measure import interference
from peftkern.benchmarks.registry import OPS
from peftkern.benchmarks.tables import figure, plots

HEADER = {
    "versions": {"python": "3.11.7", "torch": "2.13.0", "peft": "0.21.2", "triton": None, "peftkern": "0.1.0"},
    "device": "A processor with a long name, of 16 cores", "cpu": {"torch_isa": "AVX2"}, "gpu": None, "threads": 2,
    "date": "2026-11-21T10:00:00+00:00", "commit": "f22ba053c2aaaa", "load": 0.1,
}  # fmt: skip


def _result(others: float | None, dropouts=(0.0, 0.1), provider="peft") -> dict:
    rows = []
    for M in (16, 512):
        common = dict(device="cpu", dtype="fp32", M=M, K=64, N=64, R=16, others_cores=others, skipped=None)
        common["pass"] = "fwd_bwd"
        base = dict(provider="base", adapter_dtype=None, dropout=None, median_ms=2.0, p25_ms=1.9, p75_ms=2.1)
        rows.append(common | base | dict(ratio_to_base=1.0, ratio_to_fp32_base=1.0))
        for p in dropouts:
            for name, ms in ((provider, 4.0), ("peftkern", 1.0)):
                timed = dict(
                    provider=name, adapter_dtype="fp32", dropout=p, median_ms=ms, p25_ms=ms * 0.9, p75_ms=ms * 1.2
                )
                rows.append(common | timed | dict(ratio_to_base=ms / 2, ratio_to_fp32_base=ms / 2))
    return {"header": HEADER, "rows": rows}


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Draws a result; {file name: matplotlib's figure}."""

    def draw(result: dict) -> dict:
        found, save = {}, figure.Figure.save

        def keep(self, file, labels):
            found[file.name] = self.figure
            return save(self, file, labels)

        monkeypatch.setattr(figure.Figure, "save", keep)
        files = plots.plot(result, OPS["lora_linear"], tmp_path)
        assert [f.name for f in files] == list(found) and all(f.read_bytes()[:4] == b"\x89PNG" for f in files)
        return found

    return draw


def _words(fig) -> str:
    return "\n".join(t.get_text() for t in fig.texts).replace("\n", " ")


def test_every_dropout_has_a_panel_and_all_words_are_inside(drawn):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    found = drawn(_result(0.0))
    assert set(found) == {"lora_linear-fp32-rows.png", "lora_linear-fp32-shapes.png"}
    for fig in found.values():
        assert [ax.get_title(loc="left") for ax in fig.axes] == ["dropout 0", "dropout 0.1"]
        renderer, size = FigureCanvasAgg(fig).get_renderer(), fig.bbox
        for text in [*fig.texts, *fig.legends]:
            box = text.get_window_extent(renderer)
            assert 0 <= box.x0 and box.x1 <= size.x1 and 0 <= box.y0 and box.y1 <= size.y1, text
        words = _words(fig)
        for part in (
            "2 threads",
            "torch 2.13.0",
            "PEFT 0.21.2",
            "2026-11-21",
            "f22ba053c2",
            "AVX2",
            "rank 16",
            "quartiles",
        ):
            assert part in words
        # Bars and points as tall as the values, whiskers from quartile to quartile.
        (whisker,) = {round(s[1][1], 6) for ax in fig.axes for c in ax.containers if hasattr(c, "lines")
                      for s in c.lines[2][0].get_segments() if s[0][1] > 1}  # fmt: skip
        assert whisker == pytest.approx(2.4)


@pytest.mark.parametrize(
    "others, load, busy",
    [(0.05, 5.0, False), (0.8, 0.0, True), (None, 3.13, True), (None, 0.1, False), (None, None, False)],
)
def test_a_busy_machine_is_marked_on_the_figure(drawn, others, load, busy):
    result = _result(others)
    result["header"] = HEADER | {"load": load}
    for fig in drawn(result).values():
        assert ("BUSY MACHINE" in _words(fig)) == busy
        said = {None: "load average" if load is not None else "was not measured"}.get(
            others, f"{others or 0:.2f} cores"
        )
        assert said in _words(fig).lower()


def test_what_is_not_drawn_is_named_with_the_reason(drawn):
    result = _result(0.0)
    for row in result["rows"]:
        if row["provider"] == "peft" and row["M"] == 512:
            row.update(median_ms=None, ratio_to_base=None, ratio_to_fp32_base=None, p25_ms=None, p75_ms=None,
                       skipped="hopelessly slow here: one step took 9.0 s, limit 4 s")  # fmt: skip
    found = drawn(result)
    for fig in found.values():
        assert "Not drawn: PEFT in 2 of 4 cases: too slow to time on this machine." in _words(fig)
    bars = found["lora_linear-fp32-shapes.png"]
    assert [t.get_text() for ax in bars.axes for t in ax.texts] == ["too slow", "too slow"]


def test_others_are_counted_and_oneself_is_not(monkeypatch, tmp_path):
    stat = tmp_path / "stat"
    monkeypatch.setattr(interference, "STAT", stat)
    monkeypatch.setattr(interference.os, "sched_getaffinity", lambda pid: {0, 2}, raising=False)
    monkeypatch.setattr(interference.os, "sysconf", lambda name: 100)

    def at(busy: int, own: float, wall: float) -> None:
        # user, nice, system, idle, iowait, irq, softirq, steal; cpu1 is not ours to use.
        stat.write_text(
            f"cpu 0 0 0 0 0 0 0 0\ncpu0 {busy} 0 0 9 9 0 0 0\ncpu1 {9 * busy} 0 0 0 0 0 0 0\ncpu2 0 0 0 9 0 0 0 {busy}\n"
        )
        times = type("T", (tuple,), {"elapsed": wall})((own, 0.0, 0.0, 0.0, wall))
        monkeypatch.setattr(interference.os, "times", lambda: times)

    at(100, 0.0, 50.0)
    meter = interference.Meter()
    at(1100, 15.0, 60.0)
    assert meter.cores() == pytest.approx(0.5)  # 20 s of two processors in 10 s, 15 of them ours
    meter.restart()
    at(1200, 17.5, 70.0)
    assert meter.cores() == 0.0
    stat.unlink()
    assert meter.cores() is None
