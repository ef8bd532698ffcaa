"""What ``accelerate`` did to a model, which layers it took and left and why, who computes them, and what ran since."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..dispatch.choose import ORDER, load
from ..settings import current

_SHOWN = 3

# Rows of the call that a report asks about: a usual training step. Fewer may be better off elsewhere.
ROWS = 2048


def _plural(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def _some(names: list[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _groups(by_name: dict[str, str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for name, value in by_name.items():
        groups.setdefault(value, []).append(name)
    return dict(sorted(groups.items(), key=lambda item: -len(item[1])))


def _table(rows: list[tuple[str, list[str]]]) -> list[str]:
    # Of each row how many names, what it says about them, and some of them.
    width = max((len(str(len(names))) for _, names in rows), default=1)
    return [
        line
        for text, names in rows
        for line in (f"  {len(names):>{width}} {text}", f"  {'':>{width}}   {_some(names)}")
    ]


@dataclass
class Report:
    """Result of ``accelerate``, as of the moment of the call.

    Attributes:
        accelerated: names of the modules whose calls run fused.
        skipped: module name -> why it runs PEFT's own code. The parameters of one module that ``target_parameters``
            adapts (experts) are one entry.
        backends: name of an accelerated module -> back end that computes it ("cpu", "cuda", "triton", "reference";
            "cuda, backward triton" where they differ), at its dtype and device of now.
        note: what else was found in a model without PEFT layers.

    All are in the order of ``model.named_modules()``. Checked again at every call: the type of the layer and of its
    parts, their hooks and replaced forwards, merged, disabled and active adapters, variants, tensor types, shapes,
    dtypes, devices, a base weight that requires grad, the input, global hooks, tracing and transforms. So a layer that
    is skipped for its state is taken as soon as that state ends, and the other way round; then the first call warns, and
    ``status`` counts. Weights that FSDP holds as shards are judged as a forward will find them.
    """

    accelerated: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    backends: dict[str, str] = field(default_factory=dict)
    note: str = ""

    def by_reason(self) -> dict[str, list[str]]:
        """reason -> names of the modules skipped for it, the most frequent reason first."""
        return _groups(self.skipped)

    def __str__(self) -> str:
        total = len(self.accelerated) + len(self.skipped)
        if not total:
            return "peftkern: the model has no PEFT layer" + (f": {self.note}" if self.note else "")
        lines = [f"peftkern: {len(self.accelerated)} of {_plural(total, 'PEFT layer')} accelerated"]
        rows = [(f"run fused, back end {backend}", names) for backend, names in _groups(self.backends).items()]
        rows += [(f"run PEFT's own code: {reason}", names) for reason, names in self.by_reason().items()]
        lines += _table(rows)
        if self.accelerated:
            lines.append("  checked again at every call; peftkern.status(model) counts what ran")
        return "\n".join(lines)


@dataclass
class Status:
    """Result of ``status``: calls of accelerated layers since the last reset.

    Attributes:
        fused: calls that ran fused. stock: calls that ran PEFT's own code.
        reasons: module name -> why its last call that ran PEFT's own code did, or, for a PEFT layer whose calls
            cannot run fused and are not counted, why that is so.
    """

    fused: int = 0
    stock: int = 0
    reasons: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        head = f"peftkern: {_plural(self.fused, 'call')} ran fused, {self.stock} ran PEFT's own code"
        return "\n".join([head, *_table(list(_groups(self.reasons).items()))])


def only_reference(device: str) -> str | None:
    """Why no back end works for tensors of this device type, so that the reference computes all, or None."""
    now = current()
    if now.backend != "auto":
        return None
    reasons = {name: load(name).unavailable(now) for name in ORDER.get(device, ())}
    if all(reasons.values()):
        return "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    return None
