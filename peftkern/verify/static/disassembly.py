"""The machine code of cubins, by nvdisasm.

It takes a third of a second to start and far less to print a kernel, so kernels of one architecture are printed together, as one
row of bare instructions (``nvdisasm --binary``). What that leaves out, labels, only loops of HGMMA are read by: a
kernel that has one is printed from its cubin.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from . import sass

_ARCHITECTURE = re.compile(r"^64.?bit elf:.*?\bsm=(\w+)", re.M | re.I)
# Of cuobjdump's list of sections: number, offset, size, ..., name.
_TEXT = re.compile(r"^ *[0-9a-f]+ +([0-9a-f]+) +([0-9a-f]+) +.* \.text\.(\S+)$", re.M)
BYTES = 16  # of an instruction


def architecture(described: str) -> str:
    """``90a`` for code of sm_90a, from what ``cuobjdump -elf`` prints of a cubin."""
    return _ARCHITECTURE.search(described)[1]


def functions(
    files: Sequence[Path], described: Sequence[str], run: Callable[..., str], together: bool = True
) -> list[list[sass.Function]]:
    """The kernels of each cubin, in its order. ``described``: what ``cuobjdump -elf`` prints of each; ``run`` runs a tool.

    ``together=False``: each cubin is printed for itself, with labels.
    """
    found: list[list[sass.Function] | None] = [None] * len(files)
    alike: dict[str, list[int]] = {}
    for i, text in enumerate(described):
        alike.setdefault(architecture(text), []).append(i)
    for arch, group in alike.items():
        if together and len(group) > 1:
            printed = _together(arch, [(files[i], described[i]) for i in group], run)
            for i, own in zip(group, printed):
                if not any(instruction.parts[0] == "HGMMA" for function in own for instruction in function.code):
                    found[i] = own
    return [
        sass.functions(run("nvdisasm", "-ndf", "-c", file)) if own is None else own for file, own in zip(files, found)
    ]


def _together(arch: str, cubins: Sequence[tuple[Path, str]], run: Callable[..., str]) -> list[list[sass.Function]]:
    """The kernels of cubins of one architecture, without labels."""
    parts, names = [], []
    for file, described in cubins:
        content = file.read_bytes()
        sections = [(int(m[1], 16), int(m[2], 16), m[3]) for m in _TEXT.finditer(described)]
        parts += [content[start : start + size] for start, size, _ in sections]
        names.append([name for *_, name in sections])
    with tempfile.NamedTemporaryFile() as file:
        file.write(b"".join(parts))
        file.flush()
        code = sass.instructions(run("nvdisasm", "--binary", f"SM{arch}", file.name))
    if len(code) * BYTES != sum(map(len, parts)):
        raise RuntimeError(f"nvdisasm printed {len(code)} of {sum(map(len, parts)) // BYTES} instructions")
    cut, at = [], 0
    for part in parts:
        cut.append(tuple(code[at : at + len(part) // BYTES]))
        at += len(part) // BYTES
    pieces = iter(cut)
    return [[sass.Function(name, next(pieces), {}) for name in own] for own in names]
