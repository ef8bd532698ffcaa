"""The command line: ``python -m peftkern COMMAND`` and the console script ``peftkern``.

Each command lives in its own module, is imported when it is asked for, and parses its own arguments.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from ._version import __version__

# command: module with main(argv) -> exit code, and one line of help.
COMMANDS = {
    "demo": ("peftkern.demo", "fine-tune a real model with HF PEFT, stock and accelerated, and compare"),
    "bench": ("peftkern.benchmarks.bench", "time an op against its alternatives"),
    "tune": ("peftkern.benchmarks.tune.main", "measure what is fastest on this machine, and remember it"),
    "verify": ("peftkern.verify.main", "check the accuracy of an op on random problems against fp64"),
    "methods": ("peftkern.methods.coverage.main", "list methods: who computes them, or why there is nothing to fuse"),
    "doctor": ("peftkern.doctor", "say what works on this machine, what does not, and why"),
}


def usage() -> str:
    """The help text."""
    lines = "\n".join(f"  {name:<8} {text}" for name, (_, text) in COMMANDS.items())
    return (
        "usage: peftkern [--version] COMMAND [ARGUMENTS]\n\n"
        f"commands:\n{lines}\n\n`peftkern COMMAND --help` lists a command's arguments."
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code (2: wrong use, 3: an optional package is missing)."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if args else 2
    if args[0] in ("-V", "--version"):
        print(f"peftkern {__version__}")
        return 0
    if args[0] not in COMMANDS:
        print(f"peftkern: no command {args[0]!r}\n\n{usage()}", file=sys.stderr)
        return 2
    try:
        return importlib.import_module(COMMANDS[args[0]][0]).main(args[1:])
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        if missing in ("", "peftkern"):
            raise
        print(
            f"peftkern {args[0]}: the package {missing!r} is not installed: pip install {missing} "
            "(or all that the commands need: pip install 'peftkern[bench]')",
            file=sys.stderr,
        )
        return 3
    except BrokenPipeError:  # the reader of our output has gone (`| head`)
        return 1
