"""The loops of a kernel that hold its wgmma instructions, and how often they wait.

A loop is a set of instructions each of which can reach every other. Its inner loops are what is left of it without the
way back to its first instruction. The main loop is one that holds HGMMA and has no inner loop that does.

    for (;;) {                              one turn of a main loop
      SYNCS.PHASECHK.TRYWAIT   wait until a stage is full; on failure a small loop tries again
      HGMMA ... HGMMA gsb0     the products of a k step, the last of which ends a group
      WARPGROUP.DEPBAR         wait for products
      SYNCS.ARRIVE             hand the stage back
    }
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from .sass import Function, Instruction

_TARGET = re.compile(r"`\(([^)]+)\)")
_BARRIER = re.compile(r"^(B\d+)\b")


@dataclass(frozen=True)
class MainLoop:
    """Counts in one turn. ``waits``: barrier waits, a failed try and its repetitions count once."""

    products: int
    groups: int
    waits: int
    arrivals: int

    @property
    def steps(self) -> int:
        """k steps of a turn: groups of products, or stages handed back where those are fewer."""
        return min(self.groups, self.arrivals or self.groups)

    def problems(self) -> list[str]:
        """What is wrong with it."""
        found = []
        if self.groups == self.products:
            found.append(f"each of {self.products} HGMMA waits for the one before: ptxas has serialised them")
        elif self.waits > self.steps:
            found.append(f"{self.waits} barrier waits in {self.steps} k steps of the main loop")
        return found


def _is_wait(i: Instruction) -> bool:
    return i.parts[:2] == ["SYNCS", "PHASECHK"]


def _successors(function: Function) -> list[tuple[int, ...]]:
    """Where each instruction can go on. BSYNC goes to the label that the BSSY before it has named."""
    code, labels = function.code, function.labels
    following: list[set[int]] = [set() for _ in code]
    named: list[dict[str, frozenset[str]]] = [{} for _ in code]
    todo, seen = [0] if code else [], set()
    while todo:
        at = todo.pop()
        seen.add(at)
        i, known = code[at], named[at]
        target = _TARGET.search(i.operands)
        barrier = _BARRIER.match(i.operands)
        there = {labels[target[1]]} if target and target[1] in labels else set()
        on = {at + 1} if at + 1 < len(code) else set()
        if i.parts[0] == "BSSY" and barrier and target:
            known = {**known, barrier[1]: frozenset([target[1]])}
            there = set()
        elif i.parts[0] == "BSYNC" and barrier and known.get(barrier[1]):
            there = {labels[name] for name in known[barrier[1]]}
            on = on if i.guard else set()
        elif i.parts[0] in ("EXIT", "RET"):
            on = on if i.guard else set()
        elif i.parts[0] == "BRA":
            # A second operand is a uniform predicate; .DIV goes on where threads have not diverged.
            always = not i.guard and i.operands.startswith("`") and "DIV" not in i.parts
            on = set() if always else on
        elif i.parts[0] == "CALL":
            there = set()  # it returns
        following[at] = there | on
        for after in following[at]:
            merged = {k: known.get(k, frozenset()) | named[after].get(k, frozenset()) for k in {*known, *named[after]}}
            if after not in seen or merged != named[after]:
                named[after] = merged
                todo.append(after)
    return [tuple(sorted(f)) for f in following]


def _components(nodes: set[int], edges: list[tuple[int, ...]], without: int | None = None) -> list[set[int]]:
    """Sets of nodes that reach each other (Tarjan), in a part of the graph; no edge leads to ``without``."""
    index: dict[int, int] = {}
    low: dict[int, int] = {}
    stack: list[int] = []
    on_stack: set[int] = set()
    found: list[set[int]] = []

    def inside(n: int) -> list[int]:
        return [m for m in edges[n] if m in nodes and m != without]

    for start in sorted(nodes):
        if start in index:
            continue
        work = [(start, iter(inside(start)))]
        index[start] = low[start] = len(index)
        stack.append(start)
        on_stack.add(start)
        while work:
            node, rest = work[-1]
            for m in rest:
                if m not in index:
                    index[m] = low[m] = len(index)
                    stack.append(m)
                    on_stack.add(m)
                    work.append((m, iter(inside(m))))
                    break
                if m in on_stack:
                    low[node] = min(low[node], index[m])
            else:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[node])
                if low[node] == index[node]:
                    component = set()
                    while node not in component:
                        component.add(stack.pop())
                    on_stack -= component
                    if len(component) > 1 or node in inside(node):
                        found.append(component)
    return found


def _entry(loop: set[int], edges: list[tuple[int, ...]]) -> int:
    """Its first instruction: where it is entered."""
    entered = {m for n, after in enumerate(edges) if n not in loop for m in after if m in loop}
    return min(entered or loop)


def _repeats(function: Function, spin: set[int], wait: int, edges: list[tuple[int, ...]]) -> bool:
    """Whether a small loop around a wait only repeats one that stands before every way into it."""
    code = function.code
    sources = [n for n, after in enumerate(edges) if n not in spin and any(m in spin for m in after)]
    for source in sources:
        at = source
        starts = set(function.labels.values())
        while not _is_wait(code[at]):
            if at in starts or at == 0 or (at != source and code[at].parts[0] == "BRA"):
                return False
            at -= 1
        # The same barrier and phase; what stands before them is the predicate.
        if code[at].operands.partition(",")[2] != code[wait].operands.partition(",")[2]:
            return False
    return bool(sources)


def main_loops(function: Function) -> tuple[MainLoop, ...]:
    """Every main loop of a kernel; none if it has no HGMMA in a loop."""
    code = function.code
    products = {n for n, i in enumerate(code) if i.parts[0] == "HGMMA"}
    if not products:
        return ()
    edges = _successors(function)
    todo = [c for c in _components(set(range(len(code))), edges) if c & products]
    found = []
    while todo:
        loop = todo.pop(0)
        inner = _components(loop, edges, without=_entry(loop, edges))
        if holding := [c for c in inner if c & products]:
            todo += holding
            continue
        again = {
            n for spin in inner for n in spin if _is_wait(code[n]) and _repeats(function, spin, n, edges)
        }  # fmt: skip
        found.append(
            MainLoop(
                products=len(loop & products),
                groups=sum("gsb" in code[n].operands for n in loop & products),
                waits=sum(_is_wait(code[n]) for n in loop - again),
                arrivals=sum(code[n].parts[:2] == ["SYNCS", "ARRIVE"] for n in loop),
            )
        )
    return tuple(found)
