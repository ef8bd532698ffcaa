"""The branch of many adapters in plain PyTorch, three ways: what multi_lora_linear is compared with.

Each adds s[a_t] B[a_t] A[a_t] drop(x_t) to the rows of y in place. What depends on the ids alone (which rows an adapter
has, their order) is made beforehand: serving engines make it once per step for all layers, and so does peftkern.
A branch in another dtype than x is computed in its own and rounded before it is added.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.case import Case
from .candidates import NOT_HERE
from .many_data import MultiData, Stack


class Loop:
    """Adapter by adapter: take its rows, two products, add."""

    trains = True

    def __init__(self, data: MultiData, dtype: torch.dtype, dropout: float):
        self.dropout = dropout
        self.lists, M = data.lists(dtype), data.case.M
        rows = [(a, (data.ids == a).nonzero()[:, 0]) for a in range(data.case.adapters)]
        # None: all rows, which need no copy.
        self.groups = [(a, None if r.numel() == M else r) for a, r in rows if r.numel()]

    def leaves(self, i: int) -> list[Tensor]:
        """The adapters' matrices."""
        return [t for A, B, _ in self.lists[i] for t in (A, B)]

    def used(self, i: int) -> list[Tensor]:
        """Those that have rows, for autograd: the others get no gradient here."""
        return [t for a, _ in self.groups for t in self.lists[i][a][:2]]

    def add(self, y: Tensor, x: Tensor, i: int) -> Tensor:
        """y (M, N) += the branch of x (M, K)."""
        for a, rows in self.groups:
            A, B, s = self.lists[i][a]
            own = x if rows is None else x[rows]
            delta = (F.dropout(own.to(A.dtype), self.dropout) @ A.t() @ B.t()).to(y.dtype)
            y = y.add_(delta, alpha=s) if rows is None else y.index_add_(0, rows, delta, alpha=s)
        return y


class _Stacked:
    trains = True

    # Rows with an adapter, in the order of ``rows``, and their scalings as a column.
    def __init__(self, data: MultiData, dtype: torch.dtype, dropout: float, rows: Tensor):
        self.dropout, self.stacks, ids = dropout, data.stacks(dtype), data.ids.long()
        self.dtype = data.case.dtype
        self.ids, self.none = ids[rows], rows.numel() == 0
        self.rows = None if torch.equal(rows.cpu(), torch.arange(data.case.M)) else rows
        self.scaling = torch.tensor(data.scalings, dtype=dtype, device=ids.device)[self.ids, None]

    def leaves(self, i: int) -> list[Tensor]:
        """The two stacks."""
        return [self.stacks[i].A, self.stacks[i].B]

    used = leaves

    def add(self, y: Tensor, x: Tensor, i: int) -> Tensor:
        """y (M, N) += the branch of x (M, K)."""
        if self.none:
            return y
        stack = self.stacks[i]
        own = (x if self.rows is None else x[self.rows]).to(stack.A.dtype)
        delta = self.branch(F.dropout(own, self.dropout), stack).to(y.dtype)
        return y.add_(delta) if self.rows is None else y.index_add_(0, self.rows, delta)


class Gather(_Stacked):
    """One copy of A and B for every row, and two einsums: what vLLM does on CPU, where u is fp32, and A is copied in
    fp32 too, while the second product is in the output's dtype. For serving only."""

    trains = False

    def __init__(self, data: MultiData, dtype: torch.dtype, dropout: float):
        super().__init__(data, dtype, dropout, (data.ids >= 0).nonzero()[:, 0])

    def branch(self, x: Tensor, stack: Stack) -> Tensor:
        """(rows, N) of x (rows, K)."""
        u = torch.einsum("tk,trk->tr", x.float(), stack.A[self.ids].float()) * self.scaling
        return torch.einsum("tr,tnr->tn", u.to(self.dtype), stack.B[self.ids].to(self.dtype))


class Grouped(_Stacked):
    """Rows sorted by adapter and two ``torch.nn.functional.grouped_mm``."""

    def __init__(self, data: MultiData, dtype: torch.dtype, dropout: float):
        ids = data.ids.long()
        order = ids.sort(stable=True).indices[(ids < 0).sum() :]
        super().__init__(data, dtype, dropout, order)
        self.ends = self.ids.bincount(minlength=data.case.adapters).cumsum(0).to(torch.int32)

    def branch(self, x: Tensor, stack: Stack) -> Tensor:
        """(rows, N) of x (rows, K)."""
        u = F.grouped_mm(x, stack.A.transpose(1, 2), offs=self.ends) * self.scaling
        return F.grouped_mm(u, stack.B.transpose(1, 2), offs=self.ends)


def ungrouped(case: Case) -> str | None:
    """Why Grouped cannot run a case on this GPU, or None."""
    if case.device == "cpu":
        return None
    if not case.adapter_dtype == case.dtype == torch.bfloat16:
        return f"{NOT_HERE}torch.nn.functional.grouped_mm takes bf16 alone on a GPU"
    x, w = (torch.ones(*shape, dtype=case.dtype, device=case.device) for shape in ((2, 16), (1, 16, 16)))
    try:
        F.grouped_mm(x, w, offs=torch.tensor([2], dtype=torch.int32, device=case.device))
    except (RuntimeError, NotImplementedError, AttributeError) as error:
        return f"{NOT_HERE}torch.nn.functional.grouped_mm does not run: {str(error).splitlines()[0]}"
    return None


def no_grouped_mm() -> str | None:
    """Why Grouped cannot run on a CPU, or None."""
    if not hasattr(F, "grouped_mm"):
        return f"torch {torch.__version__} has no torch.nn.functional.grouped_mm"
    x, w = torch.ones(2, 16), torch.ones(1, 16, 16)
    try:
        F.grouped_mm(x, w, offs=torch.tensor([2], dtype=torch.int32))
    except (RuntimeError, NotImplementedError) as error:
        return f"torch.nn.functional.grouped_mm does not run on CPU here: {str(error).splitlines()[0]}"
    return None
