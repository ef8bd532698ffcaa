"""block_rotate and its gradient on CPU: a native call each (csrc/cpu/rotate)."""

from __future__ import annotations

import torch

from ...problem import Problem
from . import call
from .native import _C

# Columns of a block, at most: beyond, a block is a matrix product that the vendor's library is made for.
MAX_SIZE = 0 if _C is None else _C.block_rotate_max_size


def decline(problem: Problem) -> str | None:
    """Why this problem cannot be taken, or None."""
    if problem.R > MAX_SIZE:
        return f"rotates blocks of at most {MAX_SIZE} columns, not {problem.R}"
    return None


def block_rotate_fwd(c, way):
    """y (M, K), see ``peftkern.ops.block_rotate``."""
    return call.answered(call.block_rotate, call.nothing, (torch.get_num_threads(), c.x, c.R, c.index))


def block_rotate_bwd(c, way):
    """fp32 (K / b, b, b), likewise."""
    return call.answered(call.block_rotate_grad, call.nothing, (torch.get_num_threads(), *c))


OPS = {"block_rotate_fwd": block_rotate_fwd, "block_rotate_bwd": block_rotate_bwd}
