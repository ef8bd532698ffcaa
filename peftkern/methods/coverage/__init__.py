"""Every method that the surveys and the libraries name: covered, not yet, or nothing to fuse. ``row`` says what a row is,
``table`` adds what the registry knows, ``main`` is the command ``peftkern methods``."""

from .row import COVERED, NOT_YET, NOTHING, Row
from .table import ROWS, entry, record, records, status

__all__ = ["COVERED", "NOTHING", "NOT_YET", "ROWS", "Row", "entry", "record", "records", "status"]
