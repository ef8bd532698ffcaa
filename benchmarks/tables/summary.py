"""README's first tables: a few lines of what is gained, and which back end has which kernel."""

from __future__ import annotations

from typing import NamedTuple

from peftkern.dispatch.choose import BACKENDS, load
from peftkern.methods.coverage import back_ends

from .markdown import table

# Name of a machine by the file that its result is in.
MACHINES = {
    "zen3": "EPYC Zen 3, AVX2",
    "zen4": "EPYC Zen 4, AVX2",
    "zen4-avx512": "EPYC Zen 4, AVX-512",
    "zen5": "EPYC Zen 5, AVX-512",
}


class Line(NamedTuple):
    """What is told, of which result (op, machine), and the fields that pick the row of each provider."""

    words: str
    op: str
    machine: str
    ours: str
    fields: dict
    unit: str = "median_ms"
    base: str = ""
    theirs: str = "peft"


_STEP = {"pass": "fwd_bwd", "R": 16, "adapter_dtype": "fp32", "dropout": 0.1}
LINES = (
    Line("training step of a layer, 512 x 1024 x 1024, fp32", "lora_linear", "zen3", "peftkern",
         {**_STEP, "M": 512, "K": 1024, "N": 1024, "dtype": "fp32"}),
    Line("the same in bf16", "lora_linear", "zen3", "peftkern",
         {**_STEP, "M": 512, "K": 1024, "N": 1024, "dtype": "bf16"}),
    Line("training step of a layer, 2048 x 4096 x 4096, bf16", "lora_linear", "zen5", "peftkern",
         {**_STEP, "M": 2048, "K": 4096, "N": 4096, "dtype": "bf16"}),
    *(Line(f"{name}: training step of a layer, 1280 x 1536 x 2304, fp32", "methods_structured", "zen5", "peftkern",
           {"method": name, "pass": "fwd_bwd", "M": 1280, "K": 1536, "N": 2304, "dtype": "fp32"}, theirs="library")
      for name in ("HRA", "BOFT", "LoKr")),
    *(Line(f"LoRA over NF4: training step of a layer, {rows} x 4096 x 4096, fp32", "methods_quantised", "zen5", "peftkern",
           {"method": "LoRA over NF4", "pass": "fwd_bwd", "M": rows, "K": 4096, "N": 4096, "dtype": "fp32"}, theirs="library")
      for rows in (16, 512)),
    Line("LoRA over int8, multiplied in int8: training step of a layer, 512 x 4096 x 4096, fp32", "methods_w8a8", "zen4-avx512",
         "peftkern", {"method": "LoRA over W8A8", "pass": "fwd_bwd", "M": 512, "K": 4096, "N": 4096, "dtype": "fp32"},
         theirs="library"),
    *(Line(f"{words}, {rows} x {hidden}, fp32", "methods_residual", "zen5", "peftkern",
           {"method": method, "pass": "fwd_bwd", "M": rows, "K": hidden, "dtype": "fp32"}, theirs="library")
      for words, method, rows, hidden in (
          ("bottleneck adapter of width 64: its training step", "bottleneck adapter, seq_bn, gelu", 2048, 1024),
          ("LoReFT of rank 4 on 8 of 512 tokens: its training step", "LoReFT, pyreft", 2048, 1024),
      )),
    Line("decoding, 32 rows with 32 adapters, 4096 x 4096, bf16", "multi_lora_linear", "zen5", "peftkern_bank",
         {"pass": "fwd", "phase": "decode", "mix": "distinct", "M": 32, "K": 4096, "N": 4096, "dtype": "bf16"}),
    Line("a call of a small layer, 8 x 64 x 64, fp32, one thread", "small_calls", "zen4", "accelerated",
         {"which": "forward"}, "median_us", "nn.Linear"),
    Line("training step of a small layer, 8 x 64 x 64, fp32, one thread", "small_calls", "zen4", "accelerated",
         {"which": "forward + backward in a chain"}, "median_us", "frozen nn.Linear"),
)  # fmt: skip
_OPS = {
    "forward": ("lora_linear_fwd", frozenset()),
    "backward": ("lora_linear_bwd", frozenset({"need_x", "need_A", "need_B"})),
    "scale vectors, trained": ("lora_linear_bwd", frozenset({"need_x", "d", "p_b", "need_p_b", "g_b", "need_g_b"})),
    "residual base": ("lora_linear_fwd", frozenset({"identity"})),
    "NF4 base, forward, up to 64 rows": ("lora_linear_fwd", frozenset({"nf4"}), 64),
    "NF4 base, more rows and backward": ("lora_linear_bwd", frozenset({"nf4", "need_x", "need_A", "need_B"})),
    "many adapters, forward": ("multi_lora_linear_fwd", frozenset({"base"})),
    "many adapters, backward": ("multi_lora_linear_bwd", frozenset({"base", "need_x", "need_weights"})),
}


def _picked(rows: list[dict], provider: str, line: Line) -> float | None:
    wanted = {"provider": provider, **line.fields}
    found = [r for r in rows if all(r.get(k) == v for k, v in wanted.items())]
    return found[0][line.unit] if found else None


def gains(results: dict[str, dict]) -> list[str]:
    """Lines of the table. ``results`` by file stem; a line without a result is left out."""
    rows = []
    for line in LINES:
        result = results.get(f"{line.op}-cpu-{line.machine}")
        if result is None:
            continue
        unit = line.unit.removeprefix("median_")
        theirs, ours = (_picked(result["rows"], p, line) for p in ("PEFT" if unit == "us" else line.theirs, line.ours))
        frozen = {k: v for k, v in line.fields.items() if k not in ("R", "adapter_dtype", "dropout")}
        slow = unit == "ms" and _picked(result["rows"], "base", line._replace(fields=frozen)) is None
        name = line.base or ("base_fp32" if slow else "base")
        base = _picked(result["rows"], name, line._replace(fields=frozen))
        if theirs is None or ours is None:
            continue
        rows.append(
            [line.words, MACHINES[line.machine], "" if base is None else f"{base:,.1f} {unit}", f"{theirs:,.1f} {unit}",
             f"{ours:,.1f} {unit}", f"{theirs / ours:.2f}x"]
        )  # fmt: skip
    return table(["", "CPU, two cores", "frozen linear", "the library", "**peftkern**", "gain"], rows)


def coverage() -> list[str]:
    """Lines of the table: what is computed, and in which dtypes each back end does. The reference does all."""
    rows = [[words, *(_dtypes(name, *problem) for name in BACKENDS)] for words, problem in _OPS.items()]
    heads = {"cpu": "CPU, C++", "cuda": "CUDA C++", "triton": "Triton"}
    return table(["", *(heads[name] for name in BACKENDS)], rows)


def _dtypes(name: str, op: str, flags: frozenset[str], rows: int = 512) -> str:
    if op.startswith("multi"):  # which dtypes only a build with CUDA can tell
        return "yes" if op in load(name).OPS else "-"
    return ", ".join(back_ends.dtypes(name, op, flags, rows)) or "-"
