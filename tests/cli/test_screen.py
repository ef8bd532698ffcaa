"""Tables and progress as text: nothing is cut, time left follows what was measured, logs stay short."""

from __future__ import annotations

import io
import time

import pytest

from peftkern.screen import LOG_SECONDS, Cell, Console, Table, duration


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_table_is_aligned_and_never_cut():
    table = Table("a title", ("name", "time\nms"), left=("name",), caption="one\ntwo")
    table.add("x" * 300, Cell("1.5", "bold"))
    table.add("y", 12.25)
    out = io.StringIO()
    Console(out).print(table)
    lines = out.getvalue().splitlines()
    assert lines[0] == "a title" and lines[-3:] == ["  one", "  two", ""]
    assert {len(line) for line in lines[3:7]} == {2 + 300 + 2 + 5, 1 + 300 + 5 + 4}
    assert lines[5] == "  " + "x" * 300 + "    1.5" and lines[6].endswith(" 12.25") and "\x1b" not in out.getvalue()
    with pytest.raises(ValueError, match="1 cells for 2 columns"):
        table.add("alone")


def test_styles_are_for_terminals():
    shown, logged = Terminal(), io.StringIO()
    for file in (shown, logged):
        Console(file).print("careful", style="red")
    assert shown.getvalue() == "\x1b[31mcareful\x1b[0m\n" and logged.getvalue() == "careful\n"


def test_time_left_follows_what_was_measured():
    clock, console = Clock(), Console(io.StringIO())
    with console.progress(10, clock=clock) as progress:
        assert progress.left() is None and "left" not in progress.text()
        clock.now += 6
        progress.advance(2)
        assert progress.left() == pytest.approx(24)
        progress.say("the third", inside=0.5)
        assert progress.left() == pytest.approx(7.5 * 6 / 2.5)
        clock.now += 4
        progress.advance(8)
        assert progress.left() == 0 and progress.text().startswith("100%  10 s gone, about 0 s left")
    # Units that are expected seconds: known before the first is done, corrected after.
    with console.progress(60, prior=5, clock=clock) as progress:
        assert progress.left() == pytest.approx(60)
        clock.now += 35
        progress.advance(15)
        assert progress.left() == pytest.approx(45 * 40 / 20)
    with console.progress(100, limit=30, clock=clock) as progress:
        assert progress.left() == 30
        clock.now += 20
        progress.advance(10)
        assert progress.left() == 10


def test_a_log_gets_a_line_now_and_then_a_terminal_one_that_changes():
    clock, log, shown = Clock(), io.StringIO(), Terminal()
    for file in (log, shown):
        with Console(file).progress(100, clock=clock) as progress:
            for k in range(100):
                progress.say(f"part {k}")
                clock.now += LOG_SECONDS / 10
                progress.advance()
    lines = log.getvalue().splitlines()
    assert 9 <= len(lines) <= 12 and all(" left  part " in line for line in lines[1:])
    assert "\n" not in shown.getvalue() and shown.getvalue().endswith("\r") and "part 99" in shown.getvalue()


def test_a_part_that_takes_long_is_seen_to_go_on(monkeypatch):
    monkeypatch.setattr("peftkern.screen.LOG_SECONDS", 0.5)
    log = io.StringIO()
    with Console(log).progress(2) as progress:
        progress.say("the only word")
        time.sleep(2.3)
    assert log.getvalue().count("the only word") >= 2


def test_a_line_of_output_does_not_mix_with_progress():
    file, clock = Terminal(), Clock()
    console = Console(file)
    with console.progress(2, clock=clock) as progress:
        progress.say("working")
        console.print("a result")
    assert file.getvalue().endswith("\ra result\n")


@pytest.mark.parametrize(
    "seconds, text", [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (185, "3 min 05 s"), (3725, "1 h 02 min")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text
