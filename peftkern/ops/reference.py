"""Steps that the references of several ops have in common."""

from __future__ import annotations

import torch
from torch import Tensor

from .dropout_mask import dropout_mask_ref, dropout_rows_ref


def times(t: Tensor, scale: Tensor | None) -> Tensor:
    """t times a vector of its columns, in t's dtype; itself without one."""
    return t if scale is None else t * scale.to(t.dtype)


def dropped(t: Tensor, p: float, seed: Tensor | None, rows: Tensor | None = None) -> Tensor:
    """t (M, C) over 1 - p where ``dropout_mask`` keeps an element, 0 elsewhere. ``rows``: those of the mask, None for all."""
    if p == 0.0:
        return t
    M, C = t.shape
    keep = dropout_mask_ref(seed, M, C, p) if rows is None else dropout_rows_ref(seed, rows, C, p)
    # where, not a product: a dropped NaN contributes exactly 0.
    return torch.where(keep, t * (1.0 / (1.0 - p)), 0.0)
