"""Every Triton launch of lora_linear, row norms and dropout masks, and what must hold of its code: wide accesses, matrix
instructions, bulk copies.

The launches are those of whole ops on meta tensors of real shapes, for a list of cases.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from peftkern.kernels import configs, launch
from peftkern.kernels.block_rotate import block_rotate, block_rotate_grad
from peftkern.kernels.call import Backward, Dropout, Forward, Needs, Scales, Settings
from peftkern.kernels.dropout import dropout_mask
from peftkern.kernels.lora_linear import forward
from peftkern.kernels.lora_linear_grad import backward
from peftkern.kernels.lora_row_norm import row_norm

from ..triton import ARCHS, NAMES, Report, captured, fits, share, tensors

BOUNDS = "triton_lora_linear"
SHAPES = ((4096, 4096), (4096, 14336), (14336, 4096), (1024, 1024), (5120, 5120))
# The block of each tensor argument, by the names of the constants that give its sides; a vector has one side.
TILES = {
    "expand_kernel": {
        "out": "BLOCK_M BLOCK_N", "base": "BLOCK_M BLOCK_N", "factor": "BLOCK_M BLOCK_N", "x": "BLOCK_M BLOCK_K",
        "w": "BLOCK_N BLOCK_K", "v": "BLOCK_M RANK", "b": "BLOCK_N RANK", "bias": "BLOCK_N", "out_scale": "BLOCK_N",
        "column_scale": "BLOCK_N", "partial": "BLOCK_N", "in_scale": "BLOCK_K", "d": "RANK", "seed": "",
    },
    "shrink_kernel": {
        "u": "BLOCK_M RANK", "x": "BLOCK_M BLOCK_K", "a": "RANK BLOCK_K", "in_scale": "BLOCK_K", "seed": "",
    },
    "adapter_grad_kernel": {
        "t": "BLOCK_M BLOCK_C", "h": "BLOCK_M BLOCK_C", "v": "BLOCK_M RANK", "parts": "BLOCK_M RANK",
        "b": "BLOCK_C RANK", "grad": "BLOCK_C RANK", "sums": "BLOCK_C", "products": "BLOCK_C", "v_scale": "RANK",
        "b_scale": "BLOCK_C", "weights": "BLOCK_M", "seed": "",
    },
    "add_blocks_kernel": {
        "out": "BLOCK_M RANK", "parts": "BLOCK_M RANK", "u": "BLOCK_M RANK", "partial": "RANK", "d": "RANK",
    },
    "finish_kernel": {
        "out": "BLOCK_C RANK", "grad": "BLOCK_C RANK", "other": "BLOCK_C RANK", "scale": "BLOCK_C", "dots": "BLOCK_C",
    },
    "add_rows_kernel": {"out": "BLOCK_C", "parts": "BLOCK_M BLOCK_C"},
    "dropout_mask_kernel": {"out": "ROWS COLUMNS", "seed": ""},
    "row_norm_kernel": {
        "parts": "BLOCK_N", "w": "BLOCK_N BLOCK_K", "a": "RANK BLOCK_K", "b": "BLOCK_N RANK",
    },
    "block_rotate_kernel": {"y": "BLOCK_M BLOCK", "x": "BLOCK_M BLOCK", "r": "BLOCK BLOCK"},
    "block_rotate_grad_kernel": {"parts": "BLOCK BLOCK", "x": "BLOCK_M BLOCK", "dy": "BLOCK_M BLOCK"},
    "bottleneck_kernel": {
        "out": "BLOCK_M BLOCK_N", "x": "BLOCK_M BLOCK_K", "a": "RANK BLOCK_K", "in_scale": "BLOCK_K", "t": "BLOCK_M RANK",
        "v": "BLOCK_M RANK", "z": "BLOCK_M RANK", "b": "BLOCK_N RANK", "column_scale": "BLOCK_N", "column_bias": "BLOCK_N",
        "residual": "BLOCK_M BLOCK_N", "sums": "RANK", "rank_bias": "RANK", "gate": "BLOCK_M", "dots": "BLOCK_M",
        "seed_in": "", "seed_out": "",
    },
    "bottleneck_rank_kernel": {
        "parts": "BLOCK_M RANK", "t": "BLOCK_M RANK", "v": "BLOCK_M RANK", "z": "BLOCK_M RANK", "sums": "RANK",
        "rank_bias": "RANK", "gate": "BLOCK_M", "dots": "BLOCK_M",
    },
    "bottleneck_out_kernel": {
        "out": "BLOCK_M BLOCK_N", "v": "BLOCK_M RANK", "b": "BLOCK_N RANK", "column_scale": "BLOCK_N",
        "column_bias": "BLOCK_N", "residual": "BLOCK_M BLOCK_N", "gate": "BLOCK_M", "seed_out": "",
    },
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One call of every op: sizes, adapters' dtype, dropout, every optional argument or only the bias, K1's base."""

    arch: int
    K: int = 4096
    N: int = 4096
    M: int = 8192
    R: int = 16
    adapter_dtype: torch.dtype = torch.float32
    p: float = 0.1
    everything: bool = False
    base: str = "fused"
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        adapter = f"{NAMES[self.dtype]}-{NAMES[self.adapter_dtype]}"
        all_arguments = "-all" * self.everything
        return f"sm_{self.arch}-{self.M}x{self.K}x{self.N}-r{self.R}-{adapter}-p{self.p}-{self.base}{all_arguments}"


def standard_cases(arch: int) -> list[Case]:
    """bf16, both dtypes of adapters, five shapes; K1 with its own product and around the vendor's."""
    return [
        Case(arch, K, N, adapter_dtype=adapter_dtype, base=base)
        for K, N in SHAPES
        for adapter_dtype in (torch.float32, torch.bfloat16)
        for base in ("fused", "epilogue")
    ]


def more_cases(arch: int) -> list[Case]:
    """Few rows, no dropout, a rank that fills half a tile, a larger one, every optional argument."""
    return [
        Case(arch, M=16, base="epilogue"),
        Case(arch, p=0.0),
        Case(arch, R=8),
        Case(arch, R=64),
        Case(arch, everything=True),
        Case(arch, everything=True, base="epilogue"),
    ]


STANDARD = [case for arch in ARCHS for case in standard_cases(arch)]
# sm_120 has the registers of sm_90, less shared memory and neither wgmma nor tensor memory.
MORE = (
    *(case for arch in ARCHS for case in more_cases(arch)),
    Case(120),
    Case(120, adapter_dtype=torch.bfloat16, base="epilogue"),
)


def capture(case: Case) -> list[launch.Launch]:
    """The launches of forward, adapter gradients, input gradient, mask, row norm and rotation, none of which runs."""

    def empty(*shape, dtype=case.dtype):
        return torch.empty(*shape, dtype=dtype, device="meta")

    def vector(size):
        return empty(size, dtype=torch.float32) if case.everything else None

    M, K, N, R = case.M, case.K, case.N, case.R
    x, dy, weight = empty(M, K), empty(M, N), empty(N, K)
    A, B = empty(R, K, dtype=case.adapter_dtype), empty(N, R, dtype=case.adapter_dtype)
    u, bias = empty(M, R, dtype=torch.float32), empty(N)
    seed, full = empty(1, dtype=torch.int64), case.everything
    settings = Settings(case.arch, fixed=configs.fixed(base=case.base))
    drop, scales = Dropout(case.p, seed), Scales(vector(R), vector(K), vector(K), vector(N), vector(N))
    needs = Needs(True, True, True, full, full, full, full, full, full)
    h = dy if full else None
    with captured() as taken:
        forward(Forward(x, weight, A, B, bias, 2.0, drop, scales, full), settings)
        backward(Backward(dy, x, u, h, weight, A, B, 2.0, drop, scales, needs), settings)
        dropout_mask(seed, M, K, 0.1)
        for w in (weight, empty(K, N).t()):
            row_norm(w, A, B, 2.0, settings)
        block_rotate(x, empty(K // 32, 32, 32, dtype=case.adapter_dtype), None, settings)
        block_rotate_grad(x, x, 32, None, settings)
    return taken


def resources(r: Report) -> list[str]:
    """Spills, registers, shared memory."""
    # Fewer than 24 registers would be a trap in place of the kernel, the assembler's answer to what it can't do.
    return fits(r) + ([f"{r.row.registers} registers: a trap, not a kernel"] if r.row.registers < 24 else [])


def widths(r: Report) -> list[str]:
    """Each access moves 16 bytes, or where a thread's share of the block is smaller, at least that share."""
    tiles, given, found = TILES[r.item.name], tensors(r.item), []
    for access in r.accesses:
        if access.tensor not in tiles:
            found.append(f"{access} is of no known argument")
        elif not access.bulk:
            mine = share(r, tiles[access.tensor], given[access.tensor].element_size())
            if access.bytes < min(16, mine):
                found.append(f"{access}, a thread's share is {mine:g} bytes")
    seen = {access.tensor for access in r.accesses}
    return found + ([f"accesses of {sorted(seen)} alone"] if seen != given.keys() else [])


def multiplies(r: Report) -> bool:
    """Whether it is a kernel whose products belong on the tensor cores: all but K1 around a base that is read."""
    return r.item.name in ("shrink_kernel", "adapter_grad_kernel") or "w" in tensors(r.item)


def instructions(r: Report) -> list[str]:
    """The matrix instruction of the architecture; tiles of K1's operands are copied in bulk."""
    if not multiplies(r):
        return []
    own_product = r.item.name == "expand_kernel"
    # K1 takes the widest instruction that its tile allows, with both operands copied in bulk.
    wide = r.item.constants["BLOCK_N"] if own_product else r"\d+"
    expected = {
        80: r"mma\.sync\.aligned\.m16n8k16\.\S*f32\.bf16\.bf16",
        90: rf"wgmma\.mma_async\.sync\.aligned\.m64n{wide}k16\.f32\.bf16\.bf16",
        100: r"tcgen05\.mma\.cta_group",
        120: r"mma\.sync\.aligned\.m16n8k16\.\S*f32\.bf16\.bf16",
    }[r.arch]
    found = [] if re.search(expected, r.ptx) else [f"no {expected}"]
    if r.arch in (90, 100) and re.search(r"\bmma\.sync", r.ptx):
        found.append("mma.sync, the slow path")
    bulk = {a.tensor for a in r.accesses if a.bulk}
    if r.arch >= 90 and own_product and bulk != {"x", "w"}:
        found.append(f"copied in bulk: {sorted(bulk)}, not x and w")
    return found


CHECKS = (resources, widths, instructions)
