"""One kernel launch as a value: what the kernel gets, before anything runs.

Every launcher of this package builds a ``Launch`` and hands it to ``submit``. The ahead-of-time tests replace
``submit``, call the launchers with meta tensors, and so compile exactly the launches that a GPU would see.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class Launch:
    """``args`` are the run-time arguments by name (tensor, descriptor, number or None), ``constants`` the constexprs."""

    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, Any]
    constants: dict[str, Any] = field(default_factory=dict)
    warps: int = 4
    stages: int = 1

    @property
    def options(self) -> dict[str, int]:
        """Triton's launch options.

        The register limit is what the block may have anyway. Saying so keeps the assembler from aiming lower for
        occupancy and spilling on the way.
        """
        limit = min(255, 65536 // (32 * self.warps))
        return dict(num_warps=self.warps, num_stages=self.stages, maxnreg=limit, enable_fp_fusion=True)

    @property
    def name(self) -> str:
        """The kernel's own name."""
        return self.kernel.fn.__name__


def submit(launch: Launch) -> None:
    """Start the kernel on the current stream of the current device. An empty grid starts nothing."""
    if 0 in launch.grid:
        return
    launch.kernel[launch.grid](**launch.args, **launch.constants, **launch.options)


_second: dict[torch.device, torch.cuda.Stream] = {}


def beside(make: Callable[[], torch.Tensor], device: torch.device) -> tuple[torch.Tensor, Callable[[], None]]:
    """(make(), join): ``make`` starts its kernels on a second stream, behind what the current one has been given.

    ``join`` makes the current stream wait for them; until then the tensor's values are not to be read.
    """
    if device.type != "cuda":
        return make(), lambda: None
    current = torch.cuda.current_stream(device)
    if device not in _second:
        _second[device] = torch.cuda.Stream(device)
    second = _second[device]
    second.wait_stream(current)
    with torch.cuda.stream(second):
        made = make()
    # Its memory is the second stream's: not to be given away before the current one has read it.
    made.record_stream(current)
    return made, lambda: current.wait_stream(second)
