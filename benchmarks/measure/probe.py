"""What is too slow to measure, found out at small shapes.

On a CPU without support for a half-precision product one training step of a real layer can take minutes. Each
provider is therefore timed once per dtype at M, K, N = 64, 256, 256, its fixed cost (measured at a tiny shape) taken
off, and the rest extrapolated by FLOPs, forward and backward apart. Small shapes run below full speed, so before
anything is skipped the estimate is made again at larger shapes, as long as those are quick themselves. What is
several times slower than the frozen fp32 linear measured in the same way (on a busy machine everything is slow) and
would take more than ``PATIENCE`` seconds a step even so is skipped, and the row says why. A step that turns out to
exceed the limit when it is run is not run again (timing.py).
"""

from __future__ import annotations

import dataclasses
import math
import time

import torch

from peftkern.problem import short

from ..core.bench import Bench
from ..core.case import FP32_BASE, Case
from .timing import timed_step

# How much slower than fp32 is hopeless.
HOPELESS = 4.0
# Longest step, in seconds, of what is hopeless: enough for one figure at a small layer, not for a whole preset.
PATIENCE = 1.5
TINY = (4, 16, 16)
# Each adapter that has rows costs something by itself.
TINY_MANY = (64, 16, 16)
SHAPES = ((64, 256, 256), (256, 512, 512), (512, 1024, 1024))


@dataclasses.dataclass
class _Speed:
    # Seconds of the fixed part, and seconds per FLOP, as (forward, backward); ``shape``: where it was measured.
    fixed: tuple[float, float]
    per_flop: tuple[float, float]
    shape: int = 0


class Probe:
    """Predicts seconds of a provider's passes. ``limit``: the longest step worth timing, PATIENCE at most."""

    def __init__(self, bench: Bench, limit: float):
        self.bench, self.limit = bench, min(limit, PATIENCE)
        self._speeds: dict[tuple, _Speed] = {}

    def predict(self, name: str, case: Case) -> tuple[float, float]:
        """Expected seconds of the forward and of the backward part."""
        if case.device == "cuda":
            return 0.0, 0.0  # every GPU that is supported multiplies half precision fast
        if sum(self._flops(name, case)) <= sum(self._flops(name, self._at(case, SHAPES[0]))):
            return 0.0, 0.0  # nothing is hopeless there
        speed = self._speed(name, case)
        while sum(seconds := self._apply(name, speed, case)) > self.limit and speed.shape + 1 < len(SHAPES):
            larger = self._at(case, SHAPES[speed.shape + 1])
            fwd, bwd = self._apply(name, speed, larger)
            if sum(self._flops(name, larger)) > sum(self._flops(name, case)) or fwd > self.limit:
                break
            both = fwd + bwd <= self.limit
            if not both and seconds[0] <= self.limit:
                break  # only the backward part is in question, and it is too slow to ask again
            self._refine(name, larger, speed, both)
            speed.shape += 1
        return seconds

    def skips(self, name: str, case: Case) -> dict[str, str]:
        """Reason for each pass that is not to be run. fp32 is hopeless nowhere."""
        if case.dtype == torch.float32:
            return {}
        fwd, bwd = self.predict(name, case)
        if fwd + bwd <= self.limit:
            return {}
        fp32_fwd, fp32_bwd = self.predict(FP32_BASE, case)
        measured = "x".join(map(str, SHAPES[self._speed(name, case).shape]))
        reasons = {}
        for which, seconds, fp32 in (("fwd", fwd, fp32_fwd), ("fwd_bwd", fwd + bwd, fp32_fwd + fp32_bwd)):
            if seconds > max(self.limit, HOPELESS * fp32):
                reasons[which] = (
                    f"hopelessly slow in {short(case.dtype)} here: {seconds:.1f} s a step expected from {measured}, "
                    f"limit {self.limit:g} s"
                )
        return reasons

    def _speed(self, name: str, case: Case) -> _Speed:
        if name == FP32_BASE:
            case = dataclasses.replace(case, dtype=torch.float32, adapter_dtype=torch.float32)
        key = (name, case.device, case.dtype, case.adapter_dtype, case.phase)
        if key not in self._speeds:
            fixed = self._seconds(name, self._at(case, TINY_MANY if case.many else TINY))
            self._speeds[key] = _Speed(fixed, (math.inf, math.inf))
            self._refine(name, self._at(case, SHAPES[0]), self._speeds[key], True)
        return self._speeds[key]

    def _refine(self, name: str, case: Case, speed: _Speed, backward: bool) -> None:
        # The fixed cost is noisy: at least a tenth of the time is taken to grow with the problem.
        measured = zip(self._seconds(name, case, backward), speed.fixed, self._flops(name, case), speed.per_flop)
        speed.per_flop = tuple(
            min(best, max(t - fixed, t / 10) / flops) if flops else 0.0 for t, fixed, flops, best in measured
        )

    def _at(self, case: Case, shape: tuple[int, int, int]) -> Case:
        M, K, N = shape
        return dataclasses.replace(case, M=M, K=K, N=N, R=min(case.R, 16))

    def _flops(self, name: str, case: Case) -> tuple[float, float]:
        fwd, both = (self.bench.floor_of(name, case, which) for which in ("fwd", "fwd_bwd"))
        forward = fwd.base_flops + fwd.branch_flops
        return forward, both.base_flops + both.branch_flops - forward

    def _apply(self, name: str, speed: _Speed, case: Case) -> tuple[float, float]:
        return tuple(f + p * n for f, p, n in zip(speed.fixed, speed.per_flop, self._flops(name, case)))

    def _seconds(self, name: str, case: Case, backward: bool = True) -> tuple[float, float]:
        provider = self.bench.providers[name]
        step = self.bench.providers[provider.probe_as or name].build(case, self.bench.data(case, 1))
        trains = "fwd_bwd" in provider.timed(case)
        backward = backward and trains
        timed_step(step, 0, backward)  # whatever is loaded at first use
        # The best of a few: another process may hold the cores for longer than the step takes.
        start, runs = time.perf_counter(), []
        while not runs or (len(runs) < 9 and time.perf_counter() - start < self.limit / 10):
            runs.append(timed_step(step, 0, backward))
        fwd, both = (min(t) for t in zip(*runs))
        return fwd, max(both - fwd, 0.0) if backward or not trains else math.inf
