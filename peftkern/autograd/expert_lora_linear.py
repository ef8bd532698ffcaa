"""expert_lora_linear: the frozen linear layers of a mixture's experts, each with a low-rank branch of its own.

    y_t = x_t W[e]^T + s * (drop(x_t) A[e]^T) B[e]^T + bias[e],      e the expert of row t

x (M, K), sorted by expert   W (E, N, K)   A (E, R, K)   B (E, N, R)   bias (E, N)

Each expert that has rows is one lora_linear on its matrices, so nothing of E x N x K elements is made, and of an expert
without rows nothing is read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..checks import check_tensor
from ..ops.dropout_mask import acting, seed_tensor
from .lora_linear import Options, lora_linear_with


def _counts(counts: Sequence[int] | Tensor, E: int, M: int) -> list[int]:
    if not isinstance(counts, (Sequence, Tensor)):
        raise TypeError(f"counts must be a sequence of ints or a tensor, got {type(counts).__name__}")
    rows = counts.flatten().tolist() if isinstance(counts, Tensor) else list(counts)
    if len(rows) != E or any(type(n) is not int or n < 0 for n in rows) or sum(rows) > M:
        raise ValueError(f"counts is {rows}, expected {E} numbers of rows, of {M} together at most")
    return rows


def by_expert(x: Tensor, counts: Sequence[int], N: int, layer: Callable[[int, Tensor], Tensor]) -> Tensor:
    """``layer(expert, its rows)`` (., N) for every expert that has rows of x (M, K), one below the other.

    counts: of each expert how many rows it has. Rows behind those of the last expert are nobody's: they give zero.
    """
    parts = x.split([*counts, x.shape[0] - sum(counts)])
    found = [layer(e, rows) for e, rows in enumerate(parts[:-1]) if rows.shape[0]]
    if parts[-1].shape[0] or not found:
        like = found[0] if found else x
        found.append(like.new_zeros((parts[-1].shape[0], N)))
    return found[0] if len(found) == 1 else torch.cat(found)


def expert_lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    counts: Sequence[int] | Tensor,
    *,
    bias: Tensor | None = None,
    scaling: float | Tensor = 1.0,
    dropout_p: float = 0.0,
    training: bool = False,
    seed: int | Tensor | None = None,
) -> Tensor:
    """Frozen linear layers, one for each expert, with a low-rank branch each, on rows that are sorted by expert.

        y_t = x_t W[e]^T + s * (drop(x_t) A[e]^T) B[e]^T + bias[e]

    Args:
        x: (M, K) in fp32, bf16 or fp16 (fp64 through the reference): first the rows of expert 0, then those of expert 1, ...
        weight: (E, N, K) in x's dtype, of any strides. Frozen: it gets no gradient.
        lora_A: (E, R, K). lora_B: (E, N, R). Both in fp32 or both in x's dtype.
        counts: how many rows each expert has, E numbers or a tensor of them (which the host waits for). Rows behind
            those of the last expert are zero in y.
        bias: (E, N). scaling: s, as in ``lora_linear``.
        dropout_p: drop probability of the branch's input, acts if ``training``.
        seed: as in ``lora_linear``. Expert e draws from seed + e, and counts its rows from 0.

    Returns:
        (M, N) in x's dtype, or the autocast dtype.

    Raises:
        ValueError, TypeError, RuntimeError: as ``lora_linear`` does, and for counts that do not fit.
    """
    check_tensor("x", x)
    if x.dim() != 2:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (M, K)")
    stacks = {"weight": weight, "lora_A": lora_A, "lora_B": lora_B}
    for name, stack in stacks.items():
        check_tensor(name, stack)
        if stack.dim() != 3 or stack.shape[0] != weight.shape[0]:
            raise ValueError(
                f"{name} has shape {tuple(stack.shape)}, expected three dimensions, the first of all experts"
            )
    E, N, _ = weight.shape
    if bias is not None and tuple(bias.shape) != (E, N):
        raise ValueError(f"bias has shape {tuple(bias.shape)}, expected (E, N) = {(E, N)}")
    rows = _counts(counts, E, x.shape[0])
    p = acting(dropout_p, training)
    drawn = seed_tensor(seed, x.device) if p > 0.0 else None
    W, A, B = (stack.unbind() for stack in stacks.values())
    b = (None,) * E if bias is None else bias.unbind()

    def layer(e: int, of: Tensor) -> Tensor:
        options = Options(scaling, p, None if drawn is None else drawn + e)
        return lora_linear_with(of, W[e], A[e], B[e], b[e], options)

    return by_expert(x, rows, N, layer)
