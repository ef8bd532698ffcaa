"""A branch of low rank beside the base."""

from . import adalora, alora, arrow, delora, dora, experts, kasa, lora, mica, osf, pvera, vera

__all__ = ["adalora", "alora", "arrow", "delora", "dora", "experts", "kasa", "lora", "mica", "osf", "pvera", "vera"]
