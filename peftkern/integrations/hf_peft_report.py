"""What ``accelerate`` did to a model: which layers it took, which it left, and why."""

from __future__ import annotations

from dataclasses import dataclass, field

_SHOWN = 3


def _plural(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def _some(names: list[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


@dataclass
class Report:
    """Result of ``accelerate``, as of the moment of the call.

    Attributes:
        accelerated: names of the modules that run fused code.
        skipped: module name -> why it runs PEFT's own code.

    Both are in the order of ``model.named_modules()``. The conditions are checked again at every call, so a
    layer that is skipped for its state (merged, disabled, a hook) is taken as soon as that state ends, and
    the other way round.
    """

    accelerated: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    def by_reason(self) -> dict[str, list[str]]:
        """reason -> names of the modules skipped for it, the most frequent reason first."""
        groups: dict[str, list[str]] = {}
        for name, reason in self.skipped.items():
            groups.setdefault(reason, []).append(name)
        return dict(sorted(groups.items(), key=lambda item: -len(item[1])))

    def __str__(self) -> str:
        total = len(self.accelerated) + len(self.skipped)
        if not total:
            return "peftkern: the model has no PEFT layer"
        lines = [f"peftkern: {len(self.accelerated)} of {_plural(total, 'PEFT layer')} accelerated"]
        groups = self.by_reason()
        width = max((len(str(len(names))) for names in groups.values()), default=1)
        for reason, names in groups.items():
            lines.append(f"  {len(names):>{width}} run PEFT's own code: {reason}")
            lines.append(f"  {'':>{width}}   {_some(names)}")
        return "\n".join(lines)
