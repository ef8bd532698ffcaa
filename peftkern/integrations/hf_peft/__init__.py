"""Hugging Face PEFT: LoRA layers on the fused op, in place and reversibly."""

from __future__ import annotations

from ..report import Report, Status
from .model import accelerate, patch, restore, status, unpatch, why_not

__all__ = ["Report", "Status", "accelerate", "patch", "restore", "status", "unpatch", "why_not"]
