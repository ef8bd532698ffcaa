"""The GPU that a result was measured on: whether there is one, what it is, and how fast it copies and multiplies.

Floors use the two rates measured here, never a data sheet's: a large copy (bytes read and written per second) and the
best of a few large products of the vendor's library.
"""

from __future__ import annotations

import re
import shutil
import subprocess

import torch

from peftkern.problem import short

# What nvidia-smi is asked, and what the header calls it. Clocks in MHz, power in W, temperature in degrees C.
QUERIES = {
    "driver_version": "driver", "clocks.sm": "sm_clock", "clocks.mem": "memory_clock", "clocks.max.sm": "max_sm_clock",
    "clocks.max.mem": "max_memory_clock", "power.draw": "power", "power.limit": "power_limit",
    "temperature.gpu": "temperature", "pstate": "state",
}  # fmt: skip
PRODUCTS = ((8192, 8192, 8192), (8192, 4096, 4096), (8192, 4096, 14336))


def unavailable() -> str | None:
    """Why nothing can be measured on a GPU here, in one line, or None."""
    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    return f"torch {torch.__version__} sees no CUDA device"


def details() -> dict:
    """What the header says of the current GPU beyond its name: sizes from torch, clocks from nvidia-smi, compilers."""
    p = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "multiprocessors": p.multi_processor_count,
        "l2_bytes": p.L2_cache_size,
        "torch_cuda": torch.version.cuda,
        "nvcc": nvcc(),
        "smi": smi(),
    }


def nvcc() -> str | None:
    """Release of the nvcc on the path, as "13.0.48"; None without one."""
    text = output("nvcc", "--version")
    found = text and re.search(r"\bV(\d+(?:\.\d+)+)", text)
    return found[1] if found else None


def smi(device: int | None = None) -> dict | None:
    """What nvidia-smi says now (see QUERIES), None where it is absent or fails. Clocks at rest are low."""
    index = torch.cuda.current_device() if device is None else device
    text = output("nvidia-smi", f"--id={_identity(index)}", f"--query-gpu={','.join(QUERIES)}",
                   "--format=csv,noheader,nounits")  # fmt: skip
    return None if text is None else parse(text)


def parse(text: str) -> dict | None:
    """The first line of nvidia-smi's answer to QUERIES: numbers as numbers, None for what the GPU does not tell."""
    words = [word.strip() for word in (text.strip().splitlines() or [""])[0].split(",")]
    if len(words) != len(QUERIES):
        return None

    def value(word: str) -> str | float | None:
        if not word or word.startswith("["):
            return None
        number = re.fullmatch(r"\d+(\.\d+)?", word)
        return float(word) if number else word

    found = {name: value(word) for name, word in zip(QUERIES.values(), words)}
    # A version is no number, even if it looks like one.
    return found | {"driver": words[0]}


def _identity(index: int) -> str:
    # CUDA_VISIBLE_DEVICES renumbers what torch sees, not what nvidia-smi sees.
    uuid = getattr(torch.cuda.get_device_properties(index), "uuid", None) if torch.cuda.is_available() else None
    return str(index) if uuid is None else f"GPU-{str(uuid).removeprefix('GPU-')}"


def output(*command: str) -> str | None:
    """What a program prints; None if it is absent or fails."""
    if shutil.which(command[0]) is None:
        return None
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return None


def copy_rate(clock, device: str = "cuda", megabytes: int = 512) -> float:
    """Bytes per second, read plus written, of a large copy: the best of nine samples of eight copies."""
    source = torch.ones(megabytes << 18, device=device)
    target = torch.empty_like(source)
    return _best(clock, lambda: target.copy_(source), 2.0 * source.numel() * source.element_size())


def product_rates(clock, dtypes, device: str = "cuda", products=PRODUCTS) -> dict[str, float]:
    """FLOPs per second of the vendor's product y = x w^T by dtype: the best of the sizes in ``products``."""
    found = {}
    for dtype in dtypes:
        rates = []
        for M, K, N in products:
            x, w = (torch.randn(rows, K, device=device).to(dtype) for rows in (M, N))
            rates.append(_best(clock, lambda x=x, w=w: x @ w.t(), 2.0 * M * K * N))
        found[short(dtype)] = max(rates)
    return found


def _best(clock, call, work: float, samples: int = 9, calls: int = 8) -> float:
    call()
    return work * calls / min(clock.seconds(lambda: [call() for _ in range(calls)]) for _ in range(samples))
