"""From how much work on a call is ours: below, the library's own code is faster. Measured by ``peftkern tune --cpu``.

A table of this CPU model says how much, by the name of what is computed; where it does not, the most that any packaged table
says. What the number counts is the asker's: products M K N, elements of an input. GPUs have no such limits.
"""

from __future__ import annotations

import functools

from ..settings import Settings
from . import cpu_table
from .cpu_base import this_cpu

# Elements of a weight from which on no call of a layer is too small: few rows or many, its bytes are most of the time.
WEIGHT = "weight"
# Of AdapterHub's modules, elements of x each: what looking at them costs has to be little beside the memory traffic.
BOTTLENECK, GATE = "AdapterHub, bottleneck", "AdapterHub, gate"
REFT = "AdapterHub, ReFT"  # where no rotation is made, which ours makes faster at any size
PRODUCT = "AdapterHub, frozen product"  # M K N
ADAPTERS = (BOTTLENECK, GATE, REFT, PRODUCT)


@functools.cache
def _of_cpu(name: str, isa: str, folders: tuple[str, ...]) -> int:
    from ..backends.cpu import native

    known = cpu_table.least(None, folders) if native._C is None else this_cpu(isa, folders).least
    return known.get(name, 0)


def least_work(name: str, now: Settings) -> int:
    """The least work of ``name`` that is worth our code on this CPU; 0 where nobody measured any limit."""
    for other, amount in now.least:
        if other == name:
            return amount
    return _of_cpu(name, now.cpu_isa, now.tables)
