"""``peftkern tune``: measure what is fastest on this GPU, or on this CPU, and remember it.

The table goes to a folder of the user's, or to ``--json FILE``, and is used from the next process on. A table of the package
is one that was written so into peftkern/tuned.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    argv = list(sys.argv[1:] if argv is None else argv)
    device = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    device.add_argument("--cpu", action="store_const", const="cpu", dest="device")
    device.add_argument("--cuda", action="store_const", const="cuda", dest="device")
    asked, rest = device.parse_known_args(argv)
    if (asked.device or ("cuda" if torch.cuda.is_available() else "cpu")) == "cuda":
        from . import gpu as tuner
    else:
        from . import cpu as tuner
    return tuner.main(rest)
