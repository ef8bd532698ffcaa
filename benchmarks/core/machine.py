"""What a result was measured on: the header of every JSON file."""

from __future__ import annotations

import datetime
import os
import subprocess
from pathlib import Path

import torch

from peftkern import doctor

from . import gpu

# Variables that doctor tells, by whom a processor's instruction sets can be kept from use.
HOLDING = ("PEFTKERN_CPU_ISA", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")


def commit() -> str | None:
    """Commit of the source tree (with ``+`` if there are changes), None for an installed package."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None

    def git(*args: str) -> str:
        command = ["git", "-C", str(root), *args]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def cache_bytes(device: str) -> int:
    """Size of the last cache: L3 on CPU, L2 on a GPU; 32 MiB where it is not known."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).L2_cache_size
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    units = {"K": 1 << 10, "M": 1 << 20}
    found = [int(t[:-1]) * units[t[-1]] for t in (p.read_text().strip() for p in sizes) if t[-1:] in units]
    return max(found, default=32 << 20)


def held_back(header: dict) -> str | None:
    """Why a result is not what its machine can do: variables that keep instruction sets from use. None if there are none."""
    settings = header.get("settings", {})
    found = [f"{name}={settings[name]}" for name in HOLDING if settings.get(name, "auto") != "auto"]
    return f"instruction sets are held back by {', '.join(found)}" if found else None


def header(device: str, bandwidth: float, peaks: dict[str, float] | None = None) -> dict:
    """Versions, processor or GPU, threads, settings, commit, date and the measured rates: bytes per second of a copy and,
    by dtype, FLOPs per second of multiply-adds in registers or, on a GPU, of a product."""
    fma, products = ({}, peaks) if device == "cuda" else (peaks, {})
    return {
        "versions": doctor.versions(),
        "device": torch.cuda.get_device_name() if device == "cuda" else doctor.cpu()["model"],
        "cpu": doctor.cpu(),
        "gpu": doctor.gpu() | gpu.details() if device == "cuda" else doctor.gpu(),
        "threads": torch.get_num_threads(),
        "settings": doctor.settings_in_use(),
        "base_products": doctor.base_products(),
        "cache_bytes": cache_bytes(device),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "copy_gb_per_s": round(bandwidth / 1e9, 2),
        "fma_gflop_per_s": {name: round(rate / 1e9, 1) for name, rate in (fma or {}).items()},
        "product_tflop_per_s": {name: round(rate / 1e12, 1) for name, rate in (products or {}).items()},
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
