"""From how much work on a call is worth our code (peftkern/dispatch/least.py): the same model, stock and accelerated.

At this much work and at all that is more, on layers of several sizes, no pass of ours may take longer than the library's.
Of AdapterHub's models, whose modules have limits of several names, one name at a time is ours. Names whose library is not
installed are left out.
"""

from __future__ import annotations

import copy
import functools
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

import peftkern
from peftkern.backends.cpu import native
from peftkern.bases.quantize import quantize
from peftkern.dispatch.cpu_base import BRANCH_RANKS, PAIR_RANKS, panel_rows
from peftkern.dispatch.least import ADAPTERS, WEIGHT
from peftkern.methods import METHODS, Method
from peftkern.settings import using

from ..small import medians
from ..subjects.subject import installed
from .probe import Call, Probe, powers

# What counts as no slower, between medians of one run; its seconds; and how often a run that lost is repeated before it counts,
# since one loss by chance would end the search.
TIE, SECONDS, AGAIN = 1.02, 0.1, 2
# Of square layers; and rows, most of which is more than a batch has in a small model.
SIDES, MOST_ROWS = (32, 64, 128, 256), 4096


def probes() -> Iterator[Probe]:
    """All that can be tried here."""
    if installed("peft"):
        few = [m for m in METHODS.values() if m.loses_small and m.build is not None]
        for method in few:
            yield Probe(method.name, powers(14, 27), lambda work, method=method: _layers(method, work))
        yield Probe(WEIGHT, powers(10, 21), lambda size: _weights(few, size))
    if installed("adapters"):
        from .least_adapters import probes as of_adapters

        yield from of_adapters()


def measure(names: Sequence[str] | None = None) -> dict[str, int]:
    """{name: the least work that is worth our code}, of all that can be measured here or of these names."""
    found = {}
    for probe in probes():
        if names and probe.name not in names:
            continue
        found[probe.name] = smallest(probe.amounts, lambda work, probe=probe: wins(probe, work))
        print(f"{probe.name}: from {found[probe.name]} on", file=sys.stderr)
    for name, won in ((PAIR_RANKS, _pairs_win), (BRANCH_RANKS, _branch_wins)):
        if native._C.base_gemm_bf16_usable() and (not names or name in names):
            found[name] = smallest(powers(3, 8), won)
    for half in (False, True)[: 1 + native._C.base_gemm_bf16_usable()]:
        for forward in (True, False):
            name = panel_rows(half, forward)
            if not names or name in names:
                won = functools.partial(_panels_win, half, forward)
                found[name] = smallest((4, 8, 12, 16, 24, 32, 40, 48, 56, 64), won)
    return found


def smallest(amounts: Iterable[int], won: Callable[[int], bool]) -> int:
    """The least amount at which, and at all larger ones, ours has won."""
    best = 0
    for amount in sorted(amounts, reverse=True):
        if not won(amount):
            # Not even with the most that was tried: from twice of it on, which nobody tried, there is little to lose.
            return best or 2 * amount
        best = amount
    return best


def _layers(method: Method, work: int) -> Iterator[Call]:
    for side in SIDES:
        rows = work // side**2
        if 1 <= rows <= MOST_ROWS:
            yield (
                method.build(nn.Linear(side, side).requires_grad_(False), min(8, method.rank)),
                (torch.randn(rows, side),),
            )


def _weights(methods: list[Method], size: int) -> Iterator[Call]:
    side = math.isqrt(size)
    for method in methods:
        for rows in (1, 16):
            yield (
                method.build(nn.Linear(side, size // side).requires_grad_(False), min(8, method.rank)),
                (torch.randn(rows, side),),
            )


def wins(probe: Probe, work: int) -> bool:
    """Whether no pass of ours takes longer."""
    limits = dict.fromkeys(ADAPTERS, sys.maxsize) | dict.fromkeys(METHODS, 0) | {probe.name: 0}
    with using(least=tuple(limits.items())):
        for stock, args in probe.calls(work):
            ours = copy.deepcopy(stock)
            peftkern.accelerate(ours)
            for train in (True, False):
                steps = {"stock": _step(stock, args, train), "ours": _step(ours, args, train)}
                if not any(_no_slower(**medians(steps, SECONDS)) for _ in range(1 + AGAIN)):
                    return False
    return True


def _no_slower(stock: float, ours: float) -> bool:
    return ours <= TIE * stock


def _pairs_win(ranks: int) -> bool:
    h, dy = torch.randn(2, 1024, 768, dtype=torch.bfloat16)
    leaves = [t.requires_grad_() for t in (h, torch.randn(ranks, 768).bfloat16(), torch.randn(768, ranks).bfloat16())]

    def step(kind: str) -> Callable[[], object]:
        def run() -> object:
            with using(cpu_kind=kind):
                return torch.autograd.grad(peftkern.bottleneck_adapter(*leaves), leaves, dy)

        return run

    seconds = medians({kind: step(kind) for kind in ("panels", "bf16")}, SECONDS)
    return _no_slower(stock=seconds["panels"], ours=seconds["bf16"])


def _branch_wins(ranks: int) -> bool:
    """Whether products of bf16 take no longer than those of fp32, with dropout or none, in small batches and large ones."""
    return all(_branch_wins_for(M, p, ranks) for M in (16, 1024) for p in (0.0, 0.1))


def _branch_wins_for(M: int, p: float, ranks: int) -> bool:
    x, dy = torch.randn(2, M, 1024, dtype=torch.bfloat16)
    weight, A = torch.randn(1024, 1024).bfloat16(), torch.randn(ranks, 1024).bfloat16()
    leaves = [t.requires_grad_() for t in (x, A, torch.randn(1024, ranks).bfloat16())]

    def step(least: int) -> Callable[[], object]:
        def run() -> object:
            with using(least=((BRANCH_RANKS, least),)):
                y = peftkern.lora_linear(leaves[0], weight, *leaves[1:], dropout_p=p)
                return torch.autograd.grad(y, leaves, dy)

        return run

    seconds = medians({"fp32": step(sys.maxsize), "bf16": step(0)}, SECONDS)
    return _no_slower(stock=seconds["fp32"], ours=seconds["bf16"])


def _panels_win(half: bool, forward: bool, rows: int) -> bool:
    """Whether panels of a quantised W take no longer than the product of few rows."""
    base = quantize(torch.randn(4096, 4096), "nf4")
    A, B = torch.randn(8, 4096), torch.randn(4096, 8)
    x = torch.randn(rows, 4096, dtype=torch.bfloat16 if half else torch.float32, requires_grad=not forward)

    def step(kind: str) -> Callable[[], object]:
        with using(cpu_kind=kind):
            y = peftkern.lora_linear(x, base, A, B)

        def run() -> object:
            with using(cpu_kind=kind):
                if forward:
                    return peftkern.lora_linear(x, base, A, B)
                return torch.autograd.grad(y, x, y.detach(), retain_graph=True)

        return run

    panels = "bf16" if half else "panels"
    seconds = medians({kind: step(kind) for kind in ("few", panels)}, SECONDS)
    return _no_slower(stock=seconds["few"], ours=seconds[panels])


def _step(model: nn.Module, args: tuple[Tensor, ...], train: bool) -> Callable[[], object]:
    if not train:

        def forward() -> object:
            with torch.no_grad():
                return model.eval()(*args)

        return forward
    leaves = [p for p in model.parameters() if p.requires_grad]
    args = tuple(t.detach().requires_grad_(t.is_floating_point()) for t in args)

    def step() -> object:
        y = model.train()(*args)
        y = y if isinstance(y, Tensor) else y[0]
        return torch.autograd.grad(y.sum(), [*leaves, *(t for t in args if t.requires_grad)], allow_unused=True)

    return step
