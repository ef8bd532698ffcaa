"""What ``accelerate`` does with the layers of one library. What they are and how they run is the affair of its package."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import NamedTuple

from torch import nn

from ..methods.quantised import COMPUTE
from .report import Report, Status
from .status import calls_of, clear_calls, known_calls
from .switch import Switch


class Found(NamedTuple):
    """What a look at a layer that runs fused says of it, as of now. ``backend``: who computes it. ``device``: its type."""

    backend: str
    device: str


class Library(ABC):
    """The layers of a library whose functions ``switch`` replaces. ``name``: what reports call it."""

    name: str
    switch: Switch

    @abstractmethod
    def owns(self, module: nn.Module) -> bool:
        """Whether this is one of its layers with adapters, covered or not."""

    def layers(self, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """Its layers in a model that count as one each, by name."""
        return ((name, module) for name, module in model.named_modules() if self.owns(module))

    @abstractmethod
    def type_reason(self, layer: nn.Module) -> str | None:
        """Why no layer of this type is covered in this process, or None."""

    @abstractmethod
    def patch_reason(self) -> str | None:
        """Why no layer of the process may be taken, or None."""

    @abstractmethod
    def looks(self) -> Callable[[nn.Module], Found | str]:
        """A function for one report: a layer of a covered type as it is now, or why a call of it would not run fused."""

    @abstractmethod
    def install(self) -> None:
        """Replace the functions of the library's classes by those that run marked layers fused. Idempotent."""

    def uninstall_if_unused(self) -> None:
        """Give the classes their own functions back if no mark and no patch is left."""
        self.switch.put_back_if_unused()

    def note(self, model: nn.Module) -> str:
        """What a model without layers of this library holds that a user might take for one, or an empty string."""
        return ""

    def accelerate(self, model: nn.Module, report: Report, compute: str | None) -> set[str]:
        """Mark the layers of this model and write them into the report. Returns the device types of those that run fused.

        ``compute``: as the public function takes it.
        """
        look, devices, warned = self.looks(), set(), set()
        with self.switch.lock:
            for name, layer in self.layers(model):
                found = self.type_reason(layer)
                if found is None:
                    # Marked even if its present state speaks against it: states end, and each call looks again.
                    self.install()
                    self.switch.set_mark(layer)
                    self._set_compute(layer, compute)
                    found = look(layer)
                    calls_of(layer).warned = None if isinstance(found, str) else warned
                report.libraries[name] = self.name
                if isinstance(found, str):
                    report.skipped[name] = found
                else:
                    report.accelerated.append(name)
                    report.backends[name] = found.backend
                    devices.add(found.device)
        return devices

    @staticmethod
    def _set_compute(layer: nn.Module, compute: str | None) -> None:
        layer.__dict__.pop(COMPUTE, None)
        if compute is not None:
            layer.__dict__[COMPUTE] = compute

    def status(self, model: nn.Module, answer: Status, reset: bool) -> None:
        """Add what the layers of this model did. ``reset``: start anew afterwards."""
        for name, layer in self.layers(model):
            answer.libraries[name] = self.name
            calls = known_calls(layer)
            if calls is not None:
                answer.fused += calls.fused
                answer.stock += calls.stock
            reason = (calls.reason if calls is not None else None) or self.type_reason(layer)
            if reason is not None:
                answer.reasons[name] = reason
            if reset and calls is not None:
                calls.reset()

    def restore(self, model: nn.Module) -> None:
        """Run the library's own code in the layers of this model, where all are wanted too."""
        with self.switch.lock:
            for module in model.modules():
                if self.owns(module) or self.switch.marked(module):
                    self.switch.clear_mark(module)
                    self._set_compute(module, None)
                    clear_calls(module)
            self.uninstall_if_unused()

    def patch(self) -> None:
        """Do what ``accelerate`` does for every layer of the process, present and future. Idempotent.

        Warns and changes nothing if the installed release is outside the tested range.
        """
        reason = self.patch_reason()
        if reason is not None:
            warnings.warn(f"peftkern.patch does nothing: {reason}", RuntimeWarning, stacklevel=2)
            return
        with self.switch.lock:
            self.install()
            self.switch.everywhere = True

    def unpatch(self) -> None:
        """Undo ``patch``. Models that were accelerated by name stay so until ``restore``. Idempotent."""
        with self.switch.lock:
            self.switch.everywhere = False
            self.uninstall_if_unused()
