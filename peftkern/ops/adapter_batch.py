"""Checks of what the ops of many adapters take: a table and a route, lists of matrices and of vectors, dropout."""

from __future__ import annotations

import torch

from ..checks import check_fits, check_tensor
from .adapter_table import AXES, COLUMNS, PHI, RANK_BIAS
from .dropout_mask import check_seed


def check_route(table, order, starts, M: int, device: torch.device) -> int:
    """How many slots a table has, if it and a route of M rows fit."""
    check_tensor("table", table, dtypes=(torch.int64,))
    if table.dim() != 2 or table.shape[1] != len(COLUMNS):
        raise ValueError(f"table has shape {tuple(table.shape)}, expected (slots, {len(COLUMNS)})")
    slots = table.shape[0]
    check_fits("table", table, table.shape, "(slots, columns)", device, (torch.int64,))
    check_fits("order", order, (M,), "(M,)", device, (torch.int32,))
    check_fits("starts", starts, (slots + 3,), "(slots + 3,)", device, (torch.int32,))
    return slots


def check_weights(weights, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of all matrices."""
    for i, w in enumerate(weights):
        check_tensor(f"weights[{i}]", w, dtypes=(dtype, torch.float32))
        if w.dtype != weights[0].dtype:
            raise TypeError(f"weights[{i}] has dtype {w.dtype}, expected {weights[0].dtype} like weights[0]")
        if w.device != device:
            raise ValueError(f"weights[{i}] is on {w.device}, expected {device}")
    return weights[0].dtype if weights else dtype


def check_vectors(vectors, acting: str, acc: torch.dtype, device: torch.device) -> dict[str, bool]:
    """What acts, by symbol; ``curved`` where z is not u."""
    for i, v in enumerate(vectors or ()):
        check_fits(f"vectors[{i}]", v, v.shape, "(elements,)", device, (acc,))
    symbols = acting.split()
    for symbol in symbols:
        if symbol not in AXES and symbol != PHI:
            raise ValueError(f"acting holds {symbol!r}, expected some of {', '.join((*AXES, PHI))}")
    if symbols not in ([], [PHI]) and not vectors:
        raise ValueError(f"acting is {acting!r}, but there are no vectors")
    return dict.fromkeys(symbols, True) | {"curved": PHI in symbols or RANK_BIAS in symbols}


def check_dropout(dropout_p, seed, slots: int, device: torch.device) -> None:
    """A probability for each slot and a seed, or none."""
    if dropout_p is not None:
        check_fits("dropout_p", dropout_p, (slots,), "(slots,)", device, (torch.float64,))
        check_seed(seed, device)
