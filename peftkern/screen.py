"""What commands show: lines, tables, and progress with the time that is left. No package is needed for it.

On a terminal words may be coloured and progress is one line that changes; a file or a pipe gets plain text, a line of
progress every ``LOG_SECONDS``, however long a part takes.
"""

from __future__ import annotations

import math
import shutil
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TextIO

STYLES = {"bold": "1", "dim": "2", "red": "31", "yellow": "33", "bold red": "1;31"}
LOG_SECONDS = 10.0
DRAW_SECONDS = 0.1


@dataclass(frozen=True)
class Cell:
    """A word of a table that has a style, a key of STYLES."""

    text: str
    style: str = ""

    def __str__(self) -> str:
        return self.text


@dataclass
class Table:
    """Rows of words under headers, which may have several lines. ``left``: headers of columns that are not flush right."""

    title: str
    columns: Sequence[str]
    left: Sequence[str] = ()
    caption: str = ""
    rows: list[list[Cell]] = field(default_factory=list)

    def add(self, *cells: object, style: str = "") -> None:
        """A row, one cell a column."""
        if len(cells) != len(self.columns):
            raise ValueError(f"{len(cells)} cells for {len(self.columns)} columns")
        self.rows.append([c if isinstance(c, Cell) else Cell(str(c), style) for c in cells])

    def lines(self, paint: Callable[[str, str], str] = lambda text, style: text) -> list[str]:
        """The table as text. ``paint(text, style)`` colours a word."""
        heads = [c.split("\n") for c in self.columns]
        height = max(map(len, heads), default=0)
        heads = [[""] * (height - len(h)) + h for h in heads]
        widths = [max(map(len, (*head, *(r[i].text for r in self.rows)))) for i, head in enumerate(heads)]

        def line(cells: Sequence[Cell]) -> str:
            padded = []
            for cell, width, name in zip(cells, widths, self.columns):
                text, room = paint(cell.text, cell.style), " " * (width - len(cell.text))
                padded.append(text + room if name in self.left else room + text)
            return ("  " + "  ".join(padded)).rstrip()

        out = [paint(self.title, "bold"), ""]
        out += [line([Cell(head[k]) for head in heads]) for k in range(height)]
        out += [" " + "-" * (sum(widths) + 2 * len(widths))]
        out += [line(row) for row in self.rows]
        return [*out, *(f"  {text}" for text in self.caption.split("\n") if text), ""]


class Console:
    """Where a command writes: ``file`` (default: standard output)."""

    def __init__(self, file: TextIO | None = None):
        self.file = sys.stdout if file is None else file
        self.terminal = self.file.isatty()
        self._live = ""
        self._lock = threading.RLock()

    def print(self, what: object = "", style: str = "") -> None:
        """A line, or a Table. ``style``: a key of STYLES."""
        lines = what.lines(self._paint) if isinstance(what, Table) else [self._paint(str(what), style)]
        with self._lock:
            self._clear()
            self.file.write("\n".join(lines) + "\n")
            self.file.flush()

    def _paint(self, text: str, style: str) -> str:
        return f"\x1b[{STYLES[style]}m{text}\x1b[0m" if style and self.terminal else text

    def _clear(self) -> None:
        if self._live:
            self.file.write("\r" + " " * len(self._live) + "\r")
            self._live = ""

    def _draw(self, text: str) -> None:
        # The line that changes; cut, for a terminal cannot take back a line that wraps.
        text = text[: shutil.get_terminal_size().columns - 1]
        self._clear()
        self.file.write(text)
        self.file.flush()
        self._live = text

    @contextmanager
    def progress(
        self,
        total: float,
        *,
        prior: float = 0.0,
        limit: float = math.inf,
        clock: Callable[[], float] = time.perf_counter,
    ):
        """A Progress over ``total`` units of work, whose live line is gone at the end. If the units are expected seconds,
        ``prior`` is for how many of them the expectation is trusted before what was measured counts. ``limit``: seconds
        after which the work ends in any case."""
        progress, over = Progress(self, total, prior, limit, clock), threading.Event()

        def tick() -> None:
            while not over.wait(1.0):
                progress.show()

        ticker = threading.Thread(target=tick, daemon=True)
        ticker.start()
        try:
            yield progress
        finally:
            over.set()
            ticker.join()
            self._clear()


class Progress:
    """How much of some work is done, and how long the rest will take at the speed so far."""

    def __init__(self, console: Console, total: float, prior: float, limit: float, clock: Callable[[], float]):
        self.console, self.total, self.prior, self.limit, self.clock = console, total, prior, limit, clock
        self.done = self._inside = 0.0
        self._what = ""
        self._started, self._shown = clock(), -math.inf

    def say(self, what: str, inside: float = 0.0) -> None:
        """``what`` is being done; ``inside``: units of it that are done by now, before ``advance`` counts it as a whole."""
        self._what, self._inside = what, inside
        self.show()

    def advance(self, units: float = 1.0) -> None:
        """A part is finished."""
        self.done, self._inside = self.done + units, 0.0
        self.show()

    def left(self) -> float | None:
        """Seconds that the rest will take; None while nothing is known."""
        done, gone = self.done + self._inside, self.clock() - self._started
        at_most = max(self.limit - gone, 0.0)
        if done + self.prior <= 0:
            return None if math.isinf(at_most) else at_most
        return min(max(self.total - done, 0.0) * (gone + self.prior) / (done + self.prior), at_most)

    def text(self) -> str:
        """The line."""
        share, left = min((self.done + self._inside) / max(self.total, 1e-9), 1.0), self.left()
        rest = "" if left is None else f", about {duration(left)} left"
        return f"{share:4.0%}  {duration(self.clock() - self._started)} gone{rest}  {self._what}"

    def show(self) -> None:
        """Draws the line, if it was not drawn just now."""
        now, live = self.clock(), self.console.terminal
        with self.console._lock:
            if now - self._shown >= (DRAW_SECONDS if live else LOG_SECONDS):
                self._shown = now
                (self.console._draw if live else self.console.print)(self.text())


def duration(seconds: float) -> str:
    """``42 s``, ``3 min 05 s`` or ``1 h 02 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
