"""Tile arithmetic shared by the kernels: rounding, products of split operands, order of programs.

An fp32 operand meets the tensor cores as a sum of bf16 terms: a = a0 + a1 + a2, each the rounding of what is left.
Three terms hold all 24 significant bits, two hold 16; a bf16 tile is one term and an fp16 tile is exactly two. fp16
terms are never used: lora_B is tiny early in training and would fall below their range. Of the products a_i b_j those
with i + j below the larger number of terms are kept, smallest first.

``terms == 0`` stands for "native": both operands enter as they are, in one dtype.

Triton's interpreter truncates fp32 to bf16 and multiplies bf16 matrices wrongly, so there the same terms are kept in
fp32: identical values, other storage.
"""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED: tl.constexpr = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def bf16_term(t):
    """Nearest bf16 value of each fp32 element (as bf16; as fp32 when interpreted)."""
    if INTERPRETED:
        bits = t.to(tl.int32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        result = tl.where(t == t, nearest.to(tl.float32, bitcast=True), t)
    else:
        result = t.to(tl.bfloat16)
    return result


@triton.jit
def narrow(t, DTYPE: tl.constexpr):
    """fp32 tile rounded to nearest in DTYPE."""
    if INTERPRETED:
        if DTYPE == tl.bfloat16:
            t = bf16_term(t)
    return t.to(DTYPE)


@triton.jit
def multiple(value, ALIGN: tl.constexpr):
    """``value``, a multiple of ALIGN, in a form that tells the compiler so: by itself it only looks for 1 and 16."""
    if ALIGN > 1:
        value = value // ALIGN * ALIGN
    return value


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b in fp32. With acc None a fresh product, which stays fresh when the caller adds it to a total.

    (A sum of block products rounds less than one accumulator that runs through all of them.)
    """
    if INTERPRETED:
        result = tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
        if acc is not None:
            result = acc + result
    else:
        if acc is None:
            # Without the limit the compiler turns the caller's addition into this product's accumulator. It has no
            # other effect for operands wider than 8 bits.
            result = tl.dot(a, b, input_precision=PRECISION, max_num_imprecise_acc=32)
        else:
            result = tl.dot(a, b, acc, input_precision=PRECISION)
    return result


@triton.jit
def split_dot(a, b, acc, A_TERMS: tl.constexpr, B_TERMS: tl.constexpr, PRECISION: tl.constexpr):
    """acc + a b (acc None: fresh) of tiles split into bf16 terms; A_TERMS == 1 takes a bf16 ``a`` as it is."""
    if A_TERMS == 0:
        acc = dot(a, b, acc, PRECISION)
    else:
        b0 = bf16_term(b.to(tl.float32))
        if B_TERMS > 1:
            b_rest = b.to(tl.float32) - b0.to(tl.float32)
            b1 = bf16_term(b_rest)
        if A_TERMS == 1:
            a0 = a
        else:
            a0 = bf16_term(a.to(tl.float32))
            a_rest = a.to(tl.float32) - a0.to(tl.float32)
            a1 = bf16_term(a_rest)
        if A_TERMS > 2:
            acc = dot(bf16_term(a_rest - a1.to(tl.float32)), b0, acc, PRECISION)
        if B_TERMS > 2:
            acc = dot(a0, bf16_term(b_rest - b1.to(tl.float32)), acc, PRECISION)
            if A_TERMS > 1:
                acc = dot(a1, b1, acc, PRECISION)
        if B_TERMS > 1:
            acc = dot(a0, b1, acc, PRECISION)
        if A_TERMS > 1:
            acc = dot(a1, b0, acc, PRECISION)
        acc = dot(a0, b0, acc, PRECISION)
    return acc


@triton.jit
def grouped(tile, tiles_m, tiles_n, GROUP: tl.constexpr):
    """(m, n) of a tile number: GROUP rows of tiles are walked column by column, so that their operands stay in L2."""
    per_group = GROUP * tiles_n
    group = tile // per_group
    first = group * GROUP
    rows = tl.minimum(tiles_m - first, GROUP)
    within = tile - group * per_group
    return first + within % rows, within // rows
