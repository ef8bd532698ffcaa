"""Text that every machine with Python has: public names of the standard library and their docstrings.

A pair is (dotted name, first paragraph of the docstring), for example
``("textwrap.dedent", "Remove any common leading whitespace from every line in `text`.")``. Sources are
parsed, never imported, so nothing runs and the pairs depend on the Python version alone. Modules are held
out whole: no held-out name shares its module with a training name.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

# Not the library proper. site-packages is no identifier, so it falls out by itself.
_SKIPPED = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip", "pydoc_data"}
_MIN_CHARS, _MAX_CHARS = 20, 200


class Pair(NamedTuple):
    """A public name and the first paragraph of its docstring."""

    name: str
    text: str


class Corpus(NamedTuple):
    """Training pairs and pairs of held-out modules."""

    train: list[Pair]
    held_out: list[Pair]


def collect(max_train: int = 4096, max_held_out: int = 320) -> Corpus:
    """Pairs of this Python's standard library, in an order that depends on the texts alone.

    Args:
        max_train, max_held_out: upper bounds of the two parts.
    """
    train: list[Pair] = []
    held_out: list[Pair] = []
    seen: set[str] = set()
    for module, path in _modules(Path(sysconfig.get_path("stdlib"))):
        # One top-level package in eight is held out.
        part = held_out if _hash(module.partition(".")[0]) % 8 == 0 else train
        for pair in _pairs(module, path):
            # The same sentence under two names has no right answer.
            if pair.text not in seen:
                seen.add(pair.text)
                part.append(pair)
    train.sort(key=lambda pair: _hash(pair.name))
    held_out.sort(key=lambda pair: _hash(pair.name))
    return Corpus(train[:max_train], held_out[:max_held_out])


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _modules(root: Path) -> Iterator[tuple[str, Path]]:
    """Public modules below ``root``: dotted name and source file, sorted."""
    for folder, subfolders, files in os.walk(root):
        # os.walk descends into what is left here: site-packages may hold a hundred times the library.
        subfolders[:] = sorted(d for d in subfolders if d not in _SKIPPED and d.isidentifier() and d[0] != "_")
        for file in sorted(files):
            stem, extension = os.path.splitext(file)
            if extension != ".py" or (stem[0] == "_" and stem != "__init__"):
                continue
            parts = Path(folder).relative_to(root).parts + (() if stem == "__init__" else (stem,))
            if parts:
                yield ".".join(parts), Path(folder, file)


def _pairs(module: str, path: Path) -> Iterator[Pair]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, OSError):
        return
    yield from members(module, tree)


def members(prefix: str, node: ast.AST) -> Iterator[Pair]:
    """Public classes and functions of a module or class body that have a docstring, depth first."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if child.name.startswith("_"):
            continue
        name = f"{prefix}.{child.name}"
        text = " ".join(inspect.cleandoc(ast.get_docstring(child) or "").partition("\n\n")[0].split())
        if len(text) >= _MIN_CHARS:
            yield Pair(name, text[:_MAX_CHARS].rstrip())
        if isinstance(child, ast.ClassDef):
            yield from members(name, child)
