"""What ``accelerate`` did to a model, which layers it took and left and why, who computes them, and what ran since."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..dispatch.choose import ORDER, Declined, choose, load
from ..dispatch.explain import passes
from ..problem import Problem
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
        skipped: module name -> why it runs its library's own code. The parameters of one module that ``target_parameters``
            adapts (experts) are one entry.
        backends: name of an accelerated module -> back end that computes it ("cpu", "cuda", "triton", "reference";
            "cuda, backward triton" where they differ), at its dtype and device of now.
        libraries: name of each of these modules -> the library that made it: "PEFT" or "AdapterHub".
        note: what else was found in a model without such layers.

    All are in the order of ``model.named_modules()``, library by library. Checked again at every call: the type of the layer
    and of its parts, their hooks and replaced forwards, merged, disabled and active adapters, variants, tensor types, shapes,
    dtypes, devices, a base weight that requires grad, the input, global hooks, tracing and transforms. So a layer that
    is skipped for its state is taken as soon as that state ends, and the other way round; then the first call warns, and
    ``status`` counts. Weights that FSDP holds as shards are judged as a forward will find them.
    """

    accelerated: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    backends: dict[str, str] = field(default_factory=dict)
    libraries: dict[str, str] = field(default_factory=dict)
    note: str = ""

    def by_reason(self) -> dict[str, list[str]]:
        """reason -> names of the modules skipped for it, the most frequent reason first."""
        return _groups(self.skipped)

    def __str__(self) -> str:
        taken, of = (
            set(self.accelerated),
            {name: self.libraries.get(name, "PEFT") for name in (*self.accelerated, *self.skipped)},
        )
        if not of:
            return "peftkern: the model has no PEFT layer" + (f": {self.note}" if self.note else "")
        heads = [
            f"{sum(name in taken for name in names)} of {_plural(len(names), f'{library} layer')}"
            for library, names in _groups(of).items()
        ]
        lines = [f"peftkern: {', '.join(heads)} accelerated"]
        rows = [(f"run fused, back end {backend}", names) for backend, names in _groups(self.backends).items()]
        left = {name: f"run {of[name]}'s own code: {reason}" for name, reason in self.skipped.items()}
        lines += _table(rows + list(_groups(left).items()))
        if self.accelerated:
            lines.append("  checked again at every call; peftkern.status(model) counts what ran")
        return "\n".join(lines)


@dataclass
class Status:
    """Result of ``status``: calls of accelerated layers since the last reset.

    Attributes:
        fused: calls that ran fused. stock: calls that ran the library's own code.
        reasons: module name -> why its last call that ran the library's own code did, or, for a layer whose calls
            cannot run fused and are not counted, why that is so.
        libraries: name of each layer -> the library that made it.
    """

    fused: int = 0
    stock: int = 0
    reasons: dict[str, str] = field(default_factory=dict)
    libraries: dict[str, str] = field(default_factory=dict, compare=False)

    def __str__(self) -> str:
        whose = " or ".join(f"{library}'s" for library in _groups(self.libraries)) or "PEFT's"
        head = f"peftkern: {_plural(self.fused, 'call')} ran fused, {self.stock} ran {whose} own code"
        return "\n".join([head, *_table(list(_groups(self.reasons).items()))])


def computed_by(call: Problem) -> str:
    """Name of the back end that computes this call of a public function, forward and backward.

    What ``PEFTKERN_BACKEND`` names and cannot take it is said as such: every call raises it.
    """
    try:
        forward, *rest = (choose(problem, current()).backend for problem in passes(call))
    except Declined as error:
        return f"none ({error})"
    return ", backward ".join([forward, *sorted(set(rest) - {forward})])


def only_reference(device: str) -> str | None:
    """Why no back end works for tensors of this device type, so that the reference computes all, or None."""
    now = current()
    if now.backend != "auto":
        return None
    reasons = {name: load(name).unavailable(now) for name in ORDER.get(device, ())}
    if all(reasons.values()):
        return "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    return None
