"""Hugging Face PEFT: LoRA layers on the fused op, in place and reversibly."""

from __future__ import annotations

from .model import accelerate, patch, restore, status, unpatch, why_not
from .report import Report, Status

__all__ = ["Report", "Status", "accelerate", "patch", "restore", "status", "unpatch", "why_not"]
