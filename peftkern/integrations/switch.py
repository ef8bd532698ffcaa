"""How functions of a library's classes are replaced by ours, for marked layers alone, and put back.

Each is replaced once, by one that runs the library's own unless the instance carries a mark. So an accelerated layer keeps its
type, its parameters, its hooks and its pickle; the mark is one entry of its ``__dict__``.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable

from torch import nn

KEY = "_peftkern_accelerated"


class Mark:
    """Says that a layer is accelerated, and counts as one for as long as the layer lives."""

    __slots__ = ("__weakref__", "_marks")

    def __init__(self, marks: weakref.WeakSet[Mark]) -> None:
        self._marks = marks
        marks.add(self)

    def __deepcopy__(self, memo) -> Mark:
        return Mark(self._marks)

    def __reduce__(self):
        # A plain True: the pickle of an accelerated model loads where only the library is installed.
        return bool, (1,)


class Switch:
    """What is replaced in one library, changed under the lock only.

    ``everywhere``: all layers are wanted. ``marks``: of those that are, one by one. ``replaced``: (class, name) -> the function
    that the class itself had of this name, or None, and ours.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.everywhere = False
        self.marks: weakref.WeakSet[Mark] = weakref.WeakSet()
        self.replaced: dict[tuple[type, str], tuple[Callable | None, Callable]] = {}

    def wanted(self, layer: nn.Module) -> bool:
        """Whether the user asked for this layer: by its own mark, else for all."""
        mark = layer.__dict__.get(KEY)
        return self.everywhere if mark is None else mark is not False

    def marked(self, layer: nn.Module) -> bool:
        """Whether the user asked for this very layer."""
        mark = layer.__dict__.get(KEY)
        return type(mark) is Mark and mark in self.marks

    def set_mark(self, layer: nn.Module) -> None:
        """Accelerate this layer from its next call on."""
        if type(layer.__dict__.get(KEY)) is not Mark:
            layer.__dict__[KEY] = Mark(self.marks)

    def clear_mark(self, layer: nn.Module) -> None:
        """Run the library's own code in this layer from its next call on, where all are wanted too."""
        layer.__dict__.pop(KEY, None)
        if self.everywhere:
            layer.__dict__[KEY] = False

    def replace(self, cls: type, name: str, make: Callable[[Callable | None], Callable]) -> None:
        """Put ``make`` of the class's own function, None if it inherits it, in its place. Idempotent."""
        own = vars(cls).get(name)
        if own is None or own is not self.replaced.get((cls, name), (None, None))[1]:
            ours = make(own)
            self.replaced[cls, name] = own, ours
            setattr(cls, name, ours)

    def put_back_if_unused(self) -> None:
        """Give the classes their own functions back if no mark is left and not all layers are wanted.

        If another library has replaced one of them since, that stays; ours below it then passes every call on.
        """
        with self.lock:
            if self.everywhere or len(self.marks):
                return
            for cls, name in list(self.replaced):
                own, ours = self.replaced[cls, name]
                if vars(cls).get(name) is ours:
                    delattr(cls, name) if own is None else setattr(cls, name, own)
                    del self.replaced[cls, name]
