"""What ``choose`` decides, in words: for the doctor and for reports."""

from __future__ import annotations

import dataclasses
import re

import torch

from ..problem import Problem
from ..settings import Settings
from . import cpu_base
from . import cpu_table as tables
from .choose import Choice, Declined, choose
from .cpu_table import Product
from .registry import OPS

KINDS = {
    "vendor": "torch's product",
    "panels": "peftkern, fp32 panels",
    "bf16": "peftkern, bf16 pairs",
    "amx": "peftkern, tiles of bf16",
    "few": "peftkern, one pass over W",
    "int8": "peftkern, sums of integers",
}


def functions() -> dict[str, list[str]]:
    """Public function -> the ops that it is made of, forward first."""
    found: dict[str, list[str]] = {}
    for name in OPS:
        if not name.endswith("_route"):  # made once for all layers
            found.setdefault(re.sub(r"_(fwd|bwd|add)$", "", name), []).append(name)
    return found


def passes(call: Problem) -> list[Problem]:
    """The problems of a call that trains its adapters and its input, forward first.

    ``op`` of the call is the name of a public function, its flags are those of the forward pass.
    """
    problems = []
    for op in functions()[call.op]:
        flags = call.flags
        if op == "lora_linear_bwd":
            flags = (flags - {"bias"}) | {"need_x", "need_A", "need_B"}
        elif op == "multi_lora_linear_bwd":
            flags = (flags - {"bias"}) | {"need_x", "need_weights"}
        elif op == "bottleneck_adapter_bwd":
            flags = (flags - {"down_bias", "residual"}) | {"need_h", "need_down", "need_up"}
        problems.append(dataclasses.replace(call, op=op, flags=flags))
    return problems


def decision(problem: Problem, now: Settings) -> dict:
    """``choose`` as words: op, back end, why, who declined and why; on CPU the kind of base product and its blocks."""
    try:
        choice = choose(problem, now)
    except Declined as error:
        return {"op": problem.op, "backend": None, "why": str(error), "declined": {}}
    found = {"op": problem.op, "backend": choice.backend, "why": choice.why, "declined": dict(choice.declined)}
    return found | _base_product(problem, choice)


def _base_product(problem: Problem, choice: Choice) -> dict:
    if choice.backend != "cpu" or not choice.way.kind:
        return {}
    product, kind, blocks = cpu_base.product_of(problem), choice.way.kind, None
    if kind != "vendor" and product.M * product.D * product.C:
        from ..backends.cpu import native

        found = native.blocks(kind, product.M, product.D, product.C, torch.get_num_threads())
        blocks = f"{found.rows} x {found.cols} of the result at a time, {found.bytes / 1024:.0f} KiB of scratch"
    return {"base_product": KINDS[kind], "blocks": blocks}


def base_products(now: Settings) -> dict[str, dict[str, str]]:
    """{dtype: {"forward" | "input gradient": what computes the base product on this CPU, for a W of 4096 x 4096}}."""
    on = cpu_base.this_cpu(now.cpu_isa, now.tables)
    found: dict[str, dict[str, str]] = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        by_pass = found[str(dtype).removeprefix("torch.")] = {}
        for name, forward in (("forward", True), ("input gradient", False)):
            last: dict[int, str] = {}  # the most rows of each stretch: its kind
            for M in range(1, 4097):
                kind, _ = cpu_base.choose_kind(Product(dtype, forward, M, 4096, 4096), on, now)
                if last and last[M - 1] == kind:
                    del last[M - 1]
                last[M] = kind
            *stretches, end = last.items()
            text = [f"up to {M} rows {KINDS[kind]}; " for M, kind in stretches]
            by_pass[name] = "".join(text) + ("else " if text else "") + KINDS[end[1]]
    return found


def base_table(now: Settings) -> str:
    """The table of this CPU model, or why there is none in use."""
    model, level = cpu_base.this_model(now.cpu_isa)
    table = tables.of_model(model, now.tables, level) or tables.of_model(model, now.tables)
    if table is None:
        return "none for this CPU model, so fp32 is torch's (`peftkern tune --cpu` measures one)"
    date = table.meta.get("parts", {}).get("products", table.meta["date"])
    words = f"{table.name}, measured {date[:10]} with {table.meta['threads']} threads"
    if not tables.applies(table, level):
        was, here = (" ".join(map(str, each)) for each in (table.meta["level"].values(), level))
        return f"{words}, not used: it holds for {was}, in use are {here}"
    return words
