"""Timing on a GPU: samples of several steps between two events, on inputs that rotate, in a CUDA graph where asked.

A sample starts with a write of twice the last cache, so that its first step finds the cache cold and the host is ahead
when the first event comes up. Its steps take turns over the copies of the data, which together exceed the cache (see
``rotation``). Eager samples are what a program sees that keeps its GPU busy: where the host takes longer to start the
launches than they take to run, the host is what is measured. A graph shows the launches alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch

from .timing import Entry

SAMPLE_SECONDS = 4e-3
LEAST_STEPS, MOST_STEPS = 2, 256
WARM_STEPS = 3


class Clock(Protocol):
    """What measures: ``seconds`` of what a call enqueues, and a call as a graph (raises if it cannot be one)."""

    def seconds(self, call: Callable[[], object]) -> float: ...
    def capture(self, call: Callable[[], object]) -> Callable[[], None]: ...


class CudaClock:
    """Events on the current stream. ``cache``: bytes of the last cache. Graphs share one pool of memory: no two of them
    run at the same time, and nobody reads what they leave."""

    def __init__(self, cache: int):
        self._flush = torch.empty(2 * cache, dtype=torch.uint8, device="cuda")
        self._pool = torch.cuda.graph_pool_handle()

    def seconds(self, call: Callable[[], object]) -> float:
        """Seconds from before the first launch of ``call`` to the end of its last."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def capture(self, call: Callable[[], object]) -> Callable[[], None]:
        """The replay of ``call``, which must have run before."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            call()
        torch.cuda.current_stream().wait_stream(side)
        return captured(call, pool=self._pool).replay


def captured(call: Callable[[], object], *, pool=None, keep_graph: bool = False) -> torch.cuda.CUDAGraph:
    """The graph of ``call``. Raises if it cannot be captured, and leaves torch able to draw random numbers then."""
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    before = generator.clone_state()
    graph = torch.cuda.CUDAGraph(keep_graph=keep_graph)
    try:
        with torch.cuda.graph(graph, pool=pool):
            call()
    except Exception:
        # A capture that ends in an error leaves the generator waiting for its end.
        generator.graphsafe_set_state(before)
        raise
    return graph


def rotation(each: int, cache: int, most: int = 8) -> int:
    """Copies of ``each`` bytes such that all others together exceed ``cache`` twice when a copy's turn comes again."""
    return max(2, min(most, 1 + math.ceil(2 * cache / max(each, 1))))


def steps_of_sample(seconds: float, copies: int) -> int:
    """Steps between two events, for a step that takes about ``seconds``: whole turns of the rotation."""
    wanted = min(MOST_STEPS, max(LEAST_STEPS, math.ceil(SAMPLE_SECONDS / max(seconds, 1e-9))))
    return math.ceil(wanted / copies) * copies


def run(step, i: int, backward: bool) -> None:
    """One step on copy ``i``, results dropped."""
    y = step.forward(i)
    if backward:
        torch.autograd.grad(y, step.leaves[i], step.dy[i])


def _repeat(call: Callable[[], None], times: int) -> None:
    for _ in range(times):
        call()


@dataclass
class DeviceEntry(Entry):
    """An Entry whose samples are many steps.

    ``graph``: time graphs where they can be captured; ``no_graph`` says why one could not, and is None otherwise.
    """

    clock: Clock | None = None
    copies: int = 1
    graph: bool = False
    steps: dict[str, int] = field(default_factory=dict)
    no_graph: str | None = None
    replays: dict[str, tuple[Callable[[], None], int]] = field(default_factory=dict)

    @property
    def passes(self) -> tuple[str, ...]:
        """What is still timed."""
        return tuple(p for p in ("fwd", "fwd_bwd")[: 1 + self.backward] if p not in self.stopped)

    def warm(self) -> None:
        """Everything that is done once: compiling, the first steps on every copy, the length of samples, capture."""
        with self.around():
            for i in range(max(WARM_STEPS, self.copies)):
                run(self.step, i % self.copies, self.backward)
            for which in self.passes:
                seconds = self.clock.seconds(partial(self._run, which, 0, self.copies)) / self.copies
                if seconds > self.limit:
                    self.stopped[which] = seconds
                    continue
                self.steps[which] = steps_of_sample(seconds, self.copies)
                if self.graph and self.no_graph is None:
                    self._capture(which)

    def once(self, i: int = 0) -> None:
        """A sample of each pass, recorded as seconds of one step. ``i``: the copy to start on, without a graph."""
        for which in self.passes:
            replay, times = self.replays.get(which, (None, 1))
            if replay is not None:
                took = self.clock.seconds(partial(_repeat, replay, times))
            else:
                with self.around():
                    took = self.clock.seconds(partial(self._run, which, i, self.steps[which]))
            self.seconds[which].append(took / (times * self.steps[which]))

    def _run(self, which: str, first: int, steps: int) -> None:
        for k in range(steps):
            run(self.step, (first + k) % self.copies, which == "fwd_bwd")

    def _capture(self, which: str) -> None:
        try:
            replay = self.clock.capture(partial(self._run, which, 0, self.steps[which]))
            took = self.clock.seconds(replay)
        except Exception as error:
            self.no_graph = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            self.replays.clear()
            return
        # Without the host's part a step may take a fraction of what it took.
        self.replays[which] = replay, max(1, math.ceil(SAMPLE_SECONDS / max(took, 1e-9)))
