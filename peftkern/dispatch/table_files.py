"""Files of measured tables: the packaged ones, and a user's own, which are asked first."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from ..settings import TABLES

Table = TypeVar("Table")


def slug(device: str) -> str:
    """``NVIDIA H100 80GB HBM3`` as a file name: ``nvidia-h100-80gb-hbm3``."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def read_all(folders: Sequence[str], pattern: str, parse: Callable[[dict, str], Table]) -> Iterator[tuple[str, Table]]:
    """(folder, table) of each file that matches, folders in their order, the files of each by name.

    A file that makes no sense raises ``parse``'s ValueError if it is the package's. Another one may be a version's that is
    gone: a warning, once, and it is passed over.
    """
    for folder in folders:
        for file in sorted(Path(folder).glob(pattern)):
            name = file.name if folder == TABLES else str(file)
            try:
                found = parse(json.loads(file.read_text()), name)
            except (ValueError, KeyError, TypeError) as error:
                if folder == TABLES:
                    raise
                warnings.warn(
                    f"{file} is not used, it is no table of this version ({error!r}): `peftkern tune` writes one",
                    RuntimeWarning,
                    stacklevel=2,
                )
            else:
                yield folder, found
