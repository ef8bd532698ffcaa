"""Clocks and the interleaved run.

Providers take turns within one run, in an order that rotates from round to round, so that a drift of the machine's
speed hits all alike; what is reported are medians over the rounds. Both passes come from the same training step:
``fwd`` is its forward part (grad mode on), ``fwd_bwd`` the whole, up to the gradients of x and the adapters.
Freeing the results is not timed; the garbage collector is off.
"""

from __future__ import annotations

import contextlib
import gc
import math
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from ..core.case import Step


@dataclass
class Entry:
    """A provider at work: its step, whether its backward pass runs, and seconds per round for each pass.

    A step over ``limit`` seconds ends that pass: it is not run again, and ``stopped`` holds how long it took.
    ``shift``: how many copies of the data ahead of the round this one is. ``around`` makes the context of a step.
    """

    name: str
    step: Step
    backward: bool = True
    limit: float = math.inf
    shift: int = 0
    around: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    seconds: dict[str, list[float]] = field(default_factory=lambda: {"fwd": [], "fwd_bwd": []})
    stopped: dict[str, float] = field(default_factory=dict)

    def once(self, i: int = 0) -> None:
        """One step on copy ``i``, recorded."""
        if "fwd" in self.stopped:
            return
        with self.around():
            fwd, both = timed_step(self.step, i, self.backward)
        self.seconds["fwd"].append(fwd)
        if self.backward:
            self.seconds["fwd_bwd"].append(both)
        if both > self.limit:
            self.stopped["fwd_bwd"] = both
            self.backward = False
        if fwd > self.limit:
            self.stopped["fwd"] = fwd

    def warm(self) -> None:
        """One step that counts only against the limit."""
        self.once()
        self.seconds = {"fwd": [], "fwd_bwd": []}


def timed_step(step: Step, i: int, backward: bool) -> tuple[float, float]:
    """Seconds of the forward part and of the whole step."""
    if step.dy[i].is_cuda:
        return _timed_cuda(step, i, backward)
    start = time.perf_counter()
    y = step.forward(i)
    middle = end = time.perf_counter()
    if backward:
        grads = torch.autograd.grad(y, step.leaves[i], step.dy[i])
        end = time.perf_counter()
        del grads
    return middle - start, end - start


def _timed_cuda(step: Step, i: int, backward: bool) -> tuple[float, float]:
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
    torch.cuda.synchronize()
    marks[0].record()
    y = step.forward(i)
    marks[1].record()
    if backward:
        torch.autograd.grad(y, step.leaves[i], step.dy[i])
    marks[2].record()
    torch.cuda.synchronize()
    return marks[0].elapsed_time(marks[1]) / 1e3, marks[0].elapsed_time(marks[2]) / 1e3


@contextmanager
def quiet():
    """No garbage collection inside."""
    was = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def interleave(
    entries: list[Entry], copies: int, *,
    seconds: float, min_repeats: int, max_repeats: int, often: tuple[str, ...] = (),
    after: Callable[[float], None] = lambda share: None,
) -> int:  # fmt: skip
    """Run all entries in turn until ``seconds`` have passed and each has ``min_repeats``; returns the rounds.

    Entries named in ``often`` (what the others are compared with) run twice a round, half a round apart. ``after`` is
    told after each round which share of the whole that was.
    """
    order = list(entries)
    for entry in entries:
        if entry.name in often:
            order.insert((order.index(entry) + len(entries) // 2 + 1) % (len(order) + 1), entry)
    start, done = time.perf_counter(), 0
    with quiet():
        while done < max_repeats and (done < min_repeats or time.perf_counter() - start < seconds):
            for k in range(len(order)):
                entry = order[(k + done) % len(order)]
                entry.once((done + entry.shift) % copies)
            done += 1
            gone = (time.perf_counter() - start) / max(seconds, 1e-9)
            after(min(1.0, done / max(min_repeats, 1), max(gone, done / max_repeats)))
    return done


def copy_bandwidth(device: str, megabytes: int = 256) -> float:
    """Bytes per second (read plus written) of a large copy: the best of fifteen, for a bound is what can be reached."""
    source = torch.ones(megabytes << 18, device=device)
    target = torch.empty_like(source)
    step = Step(lambda i: target.copy_(source), [[]], [source])
    target.copy_(source)
    seconds = min(timed_step(step, 0, False)[0] for _ in range(15))
    return 2 * source.numel() * 4 / seconds
