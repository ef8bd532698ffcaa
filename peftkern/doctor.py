"""``peftkern doctor``: versions, processor, back ends that work or why they do not, and what runs the base product;
with ``--op`` who computes one call of it, and why.

Everything is asked of the modules that decide, so what is printed is what a call will do. No package besides torch is
needed; none is imported to learn its version.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from . import settings
from ._version import __version__
from .dispatch import explain
from .dispatch.choose import BACKENDS, load
from .problem import DTYPES, Problem, device_arch

PACKAGES = ("torch", "triton", "peft", "adapters", "pyreft", "bitsandbytes", "transformers", "numpy")
# Instruction sets that decide which product is fast.
FEATURES = (
    "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16",
    "amx_fp16",
)  # fmt: skip
WORDS = {**DTYPES, "fp64": torch.float64}
OTHER_VARIABLES = (
    "OMP_NUM_THREADS", "OMP_PROC_BIND", "MKL_NUM_THREADS", "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA",
    "ATEN_CPU_CAPABILITY", "CUDA_VISIBLE_DEVICES", "TORCH_LOGS",
)  # fmt: skip

NO_EXTENSION = (
    "no C++ compiler when peftkern was installed; install one (apt-get install g++), then peftkern again, "
    "with pip install --force-reinstall --no-build-isolation --no-deps"
)


def versions() -> dict[str, str | None]:
    """Version of peftkern, Python and the packages that matter, None for those not installed."""
    found: dict[str, str | None] = {"peftkern": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    found["torch"] = torch.__version__
    return found


def cpu() -> dict:
    """Model name, [vendor, family, model number] where the C++ kernels are built, the instruction sets of FEATURES that it
    has, torch's level and the one our kernels use."""
    model, flags = platform.processor() or platform.machine(), set()
    info = Path("/proc/cpuinfo")
    if info.exists():
        pairs = [line.partition(":") for line in info.read_text().splitlines()]
        values = {key.strip(): value.strip() for key, _, value in reversed(pairs)}
        model = values.get("model name", model)
        flags = set(values.get("flags", values.get("Features", "")).split())
    native = extension()
    return {
        "model": model,
        "model_id": list(native.cpu_model()) if native else None,
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "features": [f for f in FEATURES if f in flags],
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "peftkern_isa": native.isa() if native else None,
    }


def gpu() -> dict | None:
    """Name, architecture, memory of the current GPU, or None."""
    if not torch.cuda.is_available():
        return None
    p = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {"name": p.name, "arch": f"sm_{p.major}{p.minor}", "memory_gib": round(p.total_memory / 2**30, 1)}


def extension():
    """The compiled module, or None where it was not built."""
    try:
        return importlib.import_module("peftkern._C")
    except ImportError:
        return None


def build() -> dict:
    """What was compiled: the C++ module, and CUDA kernels in it."""
    native = extension()
    return {
        "extension": getattr(native, "__file__", None),
        "cuda_kernels": bool(getattr(native, "cuda_built", False)),
        "torch_cuda": torch.version.cuda,
    }


def backends() -> dict[str, dict]:
    """For each back end: ``usable`` and, if not, ``reason``."""
    found: dict[str, dict] = {"reference": {"usable": True, "reason": None}}
    for name in BACKENDS:
        try:
            reason = load(name).unavailable(settings.current())
        except ImportError as error:
            reason = f"cannot be imported: {error}"
        found[name] = {"usable": reason is None, "reason": reason}
    return found


def base_products() -> dict[str, dict[str, str]]:
    """Who computes the frozen product on this CPU, {dtype: {pass: words}}; empty where the CPU back end can't run."""
    return {} if backends()["cpu"]["reason"] else explain.base_products(settings.current())


def base_table() -> str | None:
    """The table of measured base products of this CPU model, or that there is none; None where the CPU back end can't run."""
    return None if backends()["cpu"]["reason"] else explain.base_table(settings.current())


def decisions(args: argparse.Namespace) -> list[dict]:
    """Who computes the passes of the call that the arguments describe, and why."""
    device = torch.device(args.device)
    try:
        arch = device_arch(device.type, device.index)
    except (AssertionError, RuntimeError):  # no such device here
        arch = "unknown"
    dtype = WORDS[args.dtype]
    flags = {"dropout"} if args.dropout else set()
    flags |= {"base"} if args.op.startswith("multi_") else set()
    call = Problem(
        args.op, device.type, arch, dtype, WORDS[args.adapter_dtype] if args.adapter_dtype else dtype, args.M, args.N,
        args.K, args.R, frozenset(flags),
    )  # fmt: skip
    return [{"problem": str(p)} | explain.decision(p, settings.current()) for p in explain.passes(call)]


def decisions_text(found: list[dict]) -> str:
    """The decisions as readable lines."""
    lines = []
    for each in found:
        lines += [each["problem"], f"  computed by  {each['backend'] or 'nobody'}: {each['why']}"]
        lines += [f"  declined     {name}: {why}" for name, why in each["declined"].items()]
        if each.get("base_product"):
            blocks = f", {each['blocks']}" if each["blocks"] else ""
            lines.append(f"  base product {each['base_product']}{blocks}")
    return "\n".join(lines)


def settings_in_use() -> dict[str, str]:
    """Environment variables that change what runs: ours with their values in force, others where they are set."""
    now = settings.current()
    ours = {
        "PEFTKERN_BACKEND": now.backend,
        "PEFTKERN_CPU_BASE": now.cpu_base,
        "PEFTKERN_CPU_ISA": now.cpu_isa,
        "PEFTKERN_BATCH_INVARIANT": str(int(now.batch_invariant)),
        "PEFTKERN_SAVE_INPUT": now.save_input,
        "TRITON_INTERPRET": str(int(now.triton_interpret)),
    }
    return ours | {name: os.environ[name] for name in OTHER_VARIABLES if name in os.environ}


def report() -> dict:
    """Everything, as one dictionary that json can write."""
    return {
        "versions": versions(),
        "cpu": cpu(),
        "gpu": gpu(),
        "threads": torch.get_num_threads(),
        "build": build(),
        "backends": backends(),
        "base_products": base_products(),
        "base_table": base_table(),
        "settings": settings_in_use(),
    }


def _no_cuda(build: dict) -> str:
    if build["torch_cuda"] is None:
        return "not built: torch is a CPU build"
    return "not built: install peftkern again with PEFTKERN_CUDA=ON in the environment; needs nvcc and a C++ compiler"


def text(found: dict) -> str:
    """The report as readable lines."""
    lines: list[str] = []

    def section(title: str, items: dict) -> None:
        lines.extend(["", title])
        width = max((len(str(k)) for k in items), default=0)
        lines.extend(f"  {k:<{width}}  {v}" for k, v in items.items())

    absent = {k: f"not installed: pip install {k}" for k in found["versions"]}
    section("versions", {k: v or absent[k] for k, v in found["versions"].items()})
    c = dict(found["cpu"])
    c["features"] = " ".join(c["features"]) or "none of " + " ".join(FEATURES)
    c["model_id"] = "{}, family {}, model {}".format(*c["model_id"]) if c["model_id"] else "unknown"
    c["peftkern_isa"] = c["peftkern_isa"] or "no compiled kernels"
    section("processor", c | {"threads": found["threads"]})
    section("GPU", found["gpu"] or {"none": "torch sees no CUDA device"})
    b = found["build"]
    section(
        "build",
        {
            "C++ kernels": b["extension"] or f"not built: {NO_EXTENSION}",
            "CUDA kernels": "built" if b["cuda_kernels"] else _no_cuda(b),
            "torch's CUDA": b["torch_cuda"] or "none (CPU build)",
        },
    )
    section("back ends", {k: "usable" if v["usable"] else f"no: {v['reason']}" for k, v in found["backends"].items()})
    products = {
        f"{dtype} {which}": words for dtype, passes in found["base_products"].items() for which, words in passes.items()
    }
    if found["base_table"]:
        products["table"] = found["base_table"]
    section("base product on CPU", products or {"all": "torch's product, after a cast to fp32 (reference)"})
    section("settings", found["settings"])
    return "\n".join(lines[1:])


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Exit code 0: a report is no verdict."""
    parser = argparse.ArgumentParser(prog="peftkern doctor", description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE", help="write JSON to FILE, or to the terminal")
    parser.add_argument(
        "--op", choices=sorted(explain.functions()), help="say instead who computes a call of this, and why"
    )
    for size, words in (("M", "rows"), ("K", "in_features"), ("N", "out_features"), ("R", "rank")):
        parser.add_argument(f"--{size}", type=int, default=16 if size == "R" else 4096, help=words)
    parser.add_argument("--dtype", choices=WORDS, default="fp32")
    parser.add_argument("--adapter-dtype", choices=WORDS, help="default: that of the activation")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dropout", action="store_true", help="a training call with dropout")
    args = parser.parse_args(argv)
    found = decisions(args) if args.op else report()
    if args.json is None:
        print(decisions_text(found) if args.op else text(found))
    elif args.json == "-":
        json.dump(found, sys.stdout, indent=2)
        print()
    else:
        Path(args.json).write_text(json.dumps(found, indent=2) + "\n")
    return 0
