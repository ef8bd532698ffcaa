"""Which tensor each memory access of a compiled kernel belongs to, and how many bytes it moves.

Triton's PTX says, before each instruction, which line of the kernel's source it comes from. On that line stands one
``tl.load`` or ``tl.store``, whose pointer begins with the argument (``w``, or ``w.codes`` of a tuple) or with a local variable
assigned from it.
"""

from __future__ import annotations

import ast
import functools
import re
from dataclasses import dataclass
from pathlib import Path

_FILE = re.compile(r'^\s*\.file\s+(\d+)\s+"([^"]+)"')
_LOC = re.compile(r"^\s*\.loc\s+(\d+)\s+(\d+)")
_VECTOR = re.compile(r"\b(?:ld|st)\.global(?:\.(?!v\d)(?!b\d)[\w:]+)*(?:\.v(\d+))?\.b(\d+)")
_ASYNC = re.compile(r"\bcp\.async\.c[ag]\.shared\.global.*\],\s*(0x[0-9a-f]+|\d+)")
_BULK = re.compile(r"\bcp\.async\.bulk\.tensor\b")
_ANY = re.compile(r"\b(?:(?:ld|st|red|atom)\.global|cp\.async\.c[ag]\.|cp\.async\.bulk\.(?!commit|wait))")


@dataclass(frozen=True)
class Access:
    """``bytes`` per thread; ``bulk``: a tile copied as a whole, by hardware."""

    tensor: str
    bytes: int
    bulk: bool
    where: str


def _pointer(call: ast.Call) -> ast.expr | None:
    """What a call reads or writes: p of tl.load(p, ...) and tl.store(p, ...), d of d.load(...); None for others."""
    function = call.func
    if not isinstance(function, ast.Attribute) or function.attr not in ("load", "store"):
        return None
    library = isinstance(function.value, ast.Name) and function.value.id == "tl"
    return call.args[0] if library else function.value


def _first_name(node: ast.expr) -> str:
    while isinstance(node, ast.BinOp):
        node = node.left
    assert isinstance(node, (ast.Name, ast.Attribute)), ast.dump(node)
    return ast.unparse(node)


@functools.cache
def _tensors_by_line(file: str) -> dict[int, str]:
    found: dict[int, str] = {}
    for function in (n for n in ast.walk(ast.parse(Path(file).read_text())) if isinstance(n, ast.FunctionDef)):
        parameters = {a.arg for a in function.args.args}
        assigned = [n for n in ast.walk(function) if isinstance(n, ast.Assign) and isinstance(n.targets[0], ast.Name)]
        for call in (n for n in ast.walk(function) if isinstance(n, ast.Call)):
            pointer = _pointer(call)
            if pointer is None:
                continue
            name = _first_name(pointer)
            if name.partition(".")[0] not in parameters:
                before = [n for n in assigned if n.targets[0].id == name and n.lineno < call.lineno]
                name = _first_name(max(before, key=lambda n: n.lineno).value)
            for line in range(call.lineno, call.end_lineno + 1):
                assert found.setdefault(line, name) == name, f"{file}:{line}: two accesses on one line"
    return found


def accesses(ptx: str) -> tuple[Access, ...]:
    """Every access of global memory. Raises AssertionError for one that is not understood."""
    files = {m[1]: m[2] for m in map(_FILE.match, ptx.splitlines()) if m}
    found, file, line, inline = [], "", 0, False
    for text in ptx.splitlines():
        # Lines of inline assembly are counted on from the statement that they come from.
        inline = "// begin inline asm" in text or (inline and "// end inline asm" not in text)
        if (loc := _LOC.match(text)) and not inline:
            file, line = files[loc[1]], int(loc[2])
        if not _ANY.search(text):
            continue
        vector, copy, bulk = _VECTOR.search(text), _ASYNC.search(text), _BULK.search(text)
        assert vector or copy or bulk, f"not understood: {text}"
        size = int(vector[1] or 1) * int(vector[2]) // 8 if vector else int(copy[1], 0) if copy else 0
        where = f"{Path(file).name}:{line}"
        assert line in _tensors_by_line(file), f"{where} loads and stores nothing, yet {text}"
        found.append(Access(_tensors_by_line(file)[line], size, bool(bulk), where))
    return tuple(found)
