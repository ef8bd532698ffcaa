"""Runs the cases of a bench block by block and turns the times into rows.

A block is one shape, dtype and rank (and population, where there are many adapters): the frozen linear and every
provider of every case in it take turns in one run. ``R`` of a frozen linear's row tells which block it was timed in.

With many adapters a block is compared with more (case.py, REFERENCES), where the bench has it: with peftkern's own base
product, and with a large copy, whose speed in this very run is then the bandwidth of the block's rows. Every provider
reads another set of adapters in each round, so that none finds in a cache what the one before it has read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import statistics
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from peftkern.problem import short

from ..core.bench import Bench
from ..core.case import BASE, COPY, FP32_BASE, OWN_BASE, PASSES, REFERENCES, Case, Provider
from ..core.floor import Least, least
from . import launches
from .device_timing import Clock, DeviceEntry
from .interference import Meter
from .memory import peak_bytes, saved_bytes
from .probe import Probe
from .timing import Entry, interleave


@dataclass
class Settings:
    """How long to measure, and on what. ``seconds``: time for a block, exceeded where ``min_repeats`` take longer.
    ``limit``: seconds of the longest step worth timing. ``bandwidth``: of copies, bytes per second; ``peaks``: FLOPs per
    second by dtype, where they are known. ``cache``: size of the last cache. ``providers``: instead of the bench's plan.
    ``gate``: check results before timing them.

    On a GPU: ``clock``; ``graph``: time CUDA graphs (decoding always is).
    """

    preset: str
    seconds: float
    bandwidth: float
    limit: float = 4.0
    min_repeats: int = 5
    max_repeats: int = 60
    cache: int = 32 << 20
    memory: bool = False
    providers: tuple[str, ...] = ()
    gate: bool = True
    clock: Clock | None = None
    peaks: dict[str, float] = dataclasses.field(default_factory=dict)
    graph: bool = False


def blocks(cases: list[Case]) -> list[list[Case]]:
    """Cases that are timed in one interleaved run, in order."""
    return [list(group) for _, group in itertools.groupby(cases, key=lambda c: c.block)]


# Share of a block's time that goes by before the first timed round: checks, probes, warm steps.
PREPARING = 0.3


@dataclass
class _Slot:
    # One provider of one case, or a reference (case of the block's first, shown without adapter and dropout).
    provider: Provider
    case: Case
    skipped: dict[str, str]
    entry: Entry | None = None
    saved: int | None = None
    peak: dict[str, int | None] = dataclasses.field(default_factory=dict)
    launches: dict[str, int | None] = dataclasses.field(default_factory=dict)

    @property
    def is_reference(self) -> bool:
        return self.provider.name in REFERENCES

    def median(self, which: str) -> float | None:
        times = self.entry.seconds[which] if self.entry else []
        return statistics.median(times) if times and which not in self.skipped else None


class Runner:
    """Rows of a list of cases; ``run`` yields them block by block."""

    def __init__(self, bench: Bench, settings: Settings):
        self.bench, self.settings = bench, settings
        self.probe = Probe(bench, settings.limit)
        self._checks: dict[tuple, str | None] = {}
        self._fp32: dict[tuple, dict[str, float | None]] = {}

    def run(
        self, cases: list[Case], announce: Callable[[str, float], None] = lambda text, share: None
    ) -> Iterator[list[dict]]:
        """The rows of each block in turn. ``announce`` is told what is being done, and which share of its block is."""
        for block in blocks(cases):
            what = f"{short(block[0].dtype)} {'x'.join(map(str, block[0].shape))} R={block[0].R}"
            yield self._block(block, lambda doing, share, what=what: announce(f"{what}: {doing}", share))

    def _block(self, block: list[Case], say: Callable[[str, float], None]) -> list[dict]:
        s, copies = self.settings, self.bench.copies(block[0], self.settings.cache)
        say("making data", 0.0)
        data = self.bench.data(block[0], copies)
        slots = self._slots(block, say)
        for k, slot in enumerate(slots):
            say(f"warming up {slot.provider.title}", PREPARING * (1 + k / len(slots)) / 2)
            self._warm(slot, data)
        running = [slot.entry for slot in slots if slot.entry]
        for k, entry in enumerate(running if block[0].many else ()):
            entry.shift = k * copies // len(running)
        meter = Meter()
        if running:
            interleave(
                running, copies, seconds=s.seconds, min_repeats=s.min_repeats, max_repeats=s.max_repeats, often=(BASE,),
                after=lambda share: say("timing all in turn", PREPARING + (1 - PREPARING) * share),
            )  # fmt: skip
        others = meter.cores()
        for slot in slots:
            self._count(slot)
        for slot in slots:
            for which, took in (slot.entry.stopped if slot.entry else {}).items():
                slot.skipped[which] = f"hopelessly slow here: one step took {took:.1f} s, limit {s.limit:g} s"
        reference = {slot.provider.name: slot for slot in slots if slot.is_reference}
        rows = [self._row(slot, reference, which, copies) for slot in slots for which in slot.provider.timed(slot.case)]
        return self.bench.finish([row | {"others_cores": others} for row in rows])

    def _count(self, slot: _Slot) -> None:
        # What is counted, not timed: memory and, on a GPU, launches.
        entry, device = slot.entry, isinstance(slot.entry, DeviceEntry)
        if entry is None:
            return
        for which in entry.passes if device else ("fwd_bwd",) * entry.backward:
            backward = which == "fwd_bwd"
            with slot.provider.around():
                if self.settings.memory:
                    slot.peak[which] = peak_bytes(entry.step, 0, backward)
                if device and slot.provider.no_graph is None:
                    slot.launches[which] = launches.count(entry.step, 0, backward)

    def _slots(self, block: list[Case], say: Callable[[str, float], None]) -> list[_Slot]:
        first, asked = block[0], self.settings.providers
        slots = [self._slot(BASE, first)]
        # The fp32 linear is slow beside a fast bf16 one: once per shape, unless it is what to compare with. On a GPU
        # nobody would take it instead.
        needed = first.device == "cpu" and (self._slow(slots[0]) or (first.shape, first.device) not in self._fp32)
        if first.dtype != torch.float32 and needed:
            slots.append(self._slot(FP32_BASE, first))
        planned = self.bench.plan(first, self.settings.preset)
        slots += [self._slot(name, first) for name in (OWN_BASE, COPY) if name in planned]
        for case in block:
            for name in asked or self.bench.plan(case, self.settings.preset):
                if name not in REFERENCES:
                    say(f"checking {self.bench.providers[name].title}", 0.0)
                    slots.append(self._slot(name, case))
        return slots

    def _slow(self, base: _Slot) -> bool:
        own, fp32 = (sum(self.probe.predict(name, base.case)) for name in (BASE, FP32_BASE))
        return bool(base.skipped) or own > fp32

    def _slot(self, name: str, case: Case) -> _Slot:
        provider = self.bench.providers[name]
        reason = provider.missing() or self._failure(lambda: provider.unusable(case))
        if reason is None and self.settings.gate and name not in REFERENCES:
            reason = self._checked(provider, case)
        skipped: dict[str, str] = {}
        reason = reason or self._failure(lambda: skipped.update(self.probe.skips(name, case)))
        return _Slot(provider, case, dict.fromkeys(PASSES, reason) if reason else skipped)

    def _checked(self, provider: Provider, case: Case) -> str | None:
        # Once for a kind of case: what is wrong with the provider's result.
        own = "" if provider.gated and provider.around is contextlib.nullcontext else provider.name
        key = (own, case.dtype, case.adapter_dtype, case.R, case.dropout, case.M > 64, *case.many.values())
        if key not in self._checks:
            check = (lambda: self.bench.gate(case)) if provider.gated else lambda: self.bench.check(provider, case)
            with provider.around():
                self._checks[key] = self._failure(check)
        return self._checks[key]

    @staticmethod
    def _failure(call: Callable[[], str | None]) -> str | None:
        # What the call says, or its exception in one line: one provider that fails must not end a long run.
        try:
            return call()
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1].name
            return f"{type(error).__name__} in {where}: {(str(error).splitlines() or [''])[0]}"

    def _warm(self, slot: _Slot, data) -> None:
        if "fwd" in slot.skipped:
            return
        reason = self._failure(lambda: self._start(slot, data))
        if reason:
            slot.skipped.update(dict.fromkeys(PASSES, reason))

    def _start(self, slot: _Slot, data) -> None:
        # The first forward also counts what is saved; full steps on top only where they are cheap or have to compile.
        provider, case, s = slot.provider, slot.case, self.settings
        with provider.around():
            step = provider.build(case, data)
            slot.saved = saved_bytes(step)
        backward = "fwd_bwd" in provider.timed(case) and "fwd_bwd" not in slot.skipped
        if s.clock is not None:
            slot.entry = DeviceEntry(
                provider.name, step, backward, limit=s.limit, clock=s.clock, copies=len(step.leaves),
                graph=s.graph or case.phase == "decode", around=provider.around, no_graph=provider.no_graph,
            )  # fmt: skip
            slot.entry.warm()
            return
        entry = Entry(provider.name, step, backward, around=provider.around)
        cheap = sum(self.probe.predict(provider.name, case)) < 0.2
        for _ in range(provider.warm_steps or int(cheap)):
            entry.warm()
        entry.limit = s.limit
        slot.entry = entry

    def _row(self, slot: _Slot, reference: dict[str, _Slot], which: str, copies: int) -> dict:
        case, median = slot.case, slot.median(which)
        base = reference[BASE].median(which)
        fp32 = self._fp32_median(case, reference, which, base)
        name, bandwidth = slot.provider.name, self._bandwidth(reference)
        row = dict(
            op=case.op, device=case.device, dtype=short(case.dtype), M=case.M, N=case.N, K=case.K, R=case.R,
            adapter_dtype=None if slot.is_reference else short(case.adapter_dtype),
            dropout=None if slot.is_reference else case.dropout, provider=name,
        )  # fmt: skip
        row |= case.many
        row["pass"] = which
        row["median_ms"] = _ms(median)
        times = sorted(slot.entry.seconds[which]) if median is not None else []
        quarters = statistics.quantiles(times, n=4) if len(times) > 1 else times * 3
        row.update(
            min_ms=_ms(times[0]) if times else None,
            p25_ms=_ms(quarters[0]) if times else None,
            p75_ms=_ms(quarters[2]) if times else None,
            repeats=len(times),
            copies=copies,
            ratio_to_base=_ratio(median, base),
            ratio_to_fp32_base=_ratio(median, fp32),
        )
        yardstick, floors = base or fp32, self._floors(name, case, which, bandwidth)
        bound, by = floors.bound
        row["floor_ratio"] = _ratio(bound, yardstick)
        row["floor_by"] = by
        row["floor_over"] = ("base" if base else "base_fp32") if yardstick else None
        # What has no product, such as a copy, has no share of its peak.
        row["flops_bound_fraction"] = _ratio(floors.flops or None, median)
        row["bytes_bound_fraction"] = _ratio(floors.bytes, median)
        if case.many:
            own_base = reference[OWN_BASE].median(which) if OWN_BASE in reference else None
            row["ratio_to_best_base"] = _ratio(median, min(filter(None, (base, own_base)), default=None))
            row["copy_gb_per_s"] = round(bandwidth / 1e9, 2)
        row["saved_bytes"] = slot.saved if which == "fwd_bwd" else None
        row["peak_bytes"] = slot.peak.get(which)
        row |= self._device_fields(slot, which)
        row["skipped"] = slot.skipped.get(which)
        if row["ratio_to_base"] is None and row["skipped"] is None:
            row["no_base"] = reference[BASE].skipped.get(which)
        return row

    def _floors(self, name: str, case: Case, which: str, bandwidth: float) -> Least:
        if name == FP32_BASE:
            case = dataclasses.replace(case, dtype=torch.float32)
        floor = self.bench.floor_of(name, case, which)
        if name in (BASE, FP32_BASE, OWN_BASE):
            floor = dataclasses.replace(floor, branch_flops=0.0, branch_bytes=0.0)
        return least(floor, self.settings.peaks.get(short(case.dtype)), bandwidth)

    def _device_fields(self, slot: _Slot, which: str) -> dict:
        entry = slot.entry
        if not isinstance(entry, DeviceEntry):
            return {}
        return dict(
            graph=entry.graph and entry.no_graph is None, no_graph=entry.no_graph, steps=entry.steps.get(which),
            launches=slot.launches.get(which),
        )  # fmt: skip

    def _bandwidth(self, reference: dict[str, _Slot]) -> float:
        median = reference[COPY].median("fwd") if COPY in reference else None
        if median is None:
            return self.settings.bandwidth
        return self.bench.floor_of(COPY, reference[COPY].case, "fwd").branch_bytes / median

    def _fp32_median(self, case: Case, reference: dict[str, _Slot], which: str, base: float | None) -> float | None:
        if case.dtype == torch.float32:
            return base
        key = (case.shape, case.device)
        if FP32_BASE in reference:
            self._fp32.setdefault(key, {})[which] = reference[FP32_BASE].median(which)
        return self._fp32.get(key, {}).get(which)


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1e3, 5)


def _ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or not b else round(a / b, 4)
