"""Hugging Face PEFT: LoRA layers on the fused op, in place and reversibly."""

from __future__ import annotations

from ..model import accelerate, restore, status
from ..report import Report, Status
from .model import LIBRARY, why_not

patch, unpatch = LIBRARY.patch, LIBRARY.unpatch

__all__ = ["Report", "Status", "accelerate", "patch", "restore", "status", "unpatch", "why_not"]
