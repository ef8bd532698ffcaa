"""The demo: a real pretrained model fine-tuned by stock HF PEFT and through peftkern, side by side.

``python -m peftkern demo``. Like the integrations, it imports peft and transformers, and nothing imports it
but the command line.
"""

from .main import main

__all__ = ["main"]
