"""What the tests of the C++ kernels share: the instruction set levels that run here, guarded memory, numpy's Philox."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from peftkern.backends.cpu import call
from peftkern.backends.cpu import native as cpu_native

sys.path.insert(0, str(Path(__file__).resolve().parent))  # kernel_calls


def _levels() -> list[str]:
    """Names of the levels that this CPU and build can run, lowest first."""
    if cpu_native._C is None:
        return []
    names = ["plain", "avx2", "avx512"]
    cpu_native._C.set_isa("auto")
    return names[: names.index(cpu_native._C.isa()) + 1]


class _Guarded:
    """An output full of NaN inside a larger block full of NaN; ``check`` proves that nothing outside was written."""

    def __init__(self, *shape: int, dtype: torch.dtype = torch.float32, row_gap: int = 0):
        width = shape[-1] + row_gap
        rows = shape[0] if len(shape) == 2 else 1
        self.block = torch.full((64 + rows * width + 64,), float("nan"), dtype=dtype)
        inner = self.block[64 : 64 + rows * width].view(rows, width)[:, : shape[-1]]
        self.out = inner if len(shape) == 2 else inner[0]

    def check(self) -> Tensor:
        """The output, which must hold no NaN, after a look at what surrounds it."""
        result = self.out.clone()
        assert not result.isnan().any(), "an element was not written"
        self.out.fill_(float("nan"))
        assert self.block.isnan().all(), "memory outside of the output was written"
        return result


def _numpy_keep(seed: int, rows: range, cols: range, p: float) -> np.ndarray:
    """The keep bits of a block, written from the definition: Philox4x32 with 7 rounds, one call per 8 columns."""
    mask = np.uint64(0xFFFFFFFF)
    i, j = np.meshgrid(np.array(rows, dtype=np.uint64), np.array(cols, dtype=np.uint64), indexing="ij")
    group, element = j >> np.uint64(3), j & np.uint64(7)
    c = [group & mask, group >> np.uint64(32), i & mask, i >> np.uint64(32)]
    key = [seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF]
    for _ in range(7):
        p0, p1 = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [(p1 >> np.uint64(32)) ^ c[1] ^ np.uint64(key[0]), p1 & mask,
             (p0 >> np.uint64(32)) ^ c[3] ^ np.uint64(key[1]), p0 & mask]  # fmt: skip
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    z = np.choose((element >> np.uint64(1)).astype(int), c)
    rotated = ((z << np.uint64(16)) | (z >> np.uint64(16))) & mask
    return np.where(element & np.uint64(1), rotated, z) >= np.uint64(int(p * 2**32))


@pytest.fixture(params=_levels())
def level(request, monkeypatch):
    """The C++ level in force; ``auto`` again afterwards."""
    monkeypatch.setenv("PEFTKERN_CPU_ISA", request.param)
    cpu_native.use_isa(request.param)
    assert cpu_native._C.isa() == request.param
    yield request.param
    cpu_native._C.set_isa("auto")


@pytest.fixture
def guarded():
    """``guarded(*shape, dtype=, row_gap=)``: an output that notices what is written around it."""
    return _Guarded


@pytest.fixture
def numpy_keep():
    """``numpy_keep(seed, rows, cols, p)``: dropout bits by definition."""
    return _numpy_keep


class _Calls:
    """Forward calls of lora_linear under settings of their own: plans are looked up by identity."""

    @staticmethod
    def arguments(M=5, K=20, N=9, R=3, dtype=torch.float32, adapter=None, **changes) -> dict[str, object]:
        """What a plain call takes after its settings, in order; ``changes`` replace some."""
        adapter = adapter or dtype
        t = dict(
            threads=1, x=torch.randn(M, K).to(dtype), kind="dense", weight=torch.randn(N, K).to(dtype),
            lora_A=torch.randn(R, K).to(adapter), lora_B=torch.randn(N, R).to(adapter), bias=None, scaling=2.0,
            dropout_p=0.0, seed=None, scales=None, want_u=False, want_h=False,
        )  # fmt: skip
        return t | changes

    @staticmethod
    def expected(t: dict) -> Tensor:
        """y of a plain call in fp64."""
        x, w, a, b = (t[k].detach().double() for k in ("x", "weight", "lora_A", "lora_B"))
        return x @ w.t() + t["scaling"] * (x @ a.t()) @ b.t()

    def forward(self, t: dict):
        return call.forward(self, *t.values())

    def learn(self, t: dict, kind: str) -> bool:
        return call.learn_forward(self, *t.values(), kind)

    def known(self, t: dict, kind: str = "panels"):
        """The result of a call that is learnt now."""
        assert self.learn(t, kind)
        result = self.forward(t)
        assert result is not None
        return result


@pytest.fixture
def calls():
    """Native calls that nobody has looked at yet."""
    yield _Calls()
    cpu_native._C.forget_plans()


@pytest.fixture(params=[True, False], ids=["exports", "python"])
def exports(request):
    """With and without what torch's libraries export; without, results lie in memory that torch.empty has poisoned."""
    assert call.set_up(exports=request.param) is None
    yield request.param
    call.set_up()


class _GuardedResults:
    """Memory for what native calls return: every piece full of NaN, with NaN around it."""

    def __init__(self):
        self._blocks: list[tuple[Tensor, Tensor]] = []

    def empty(self, size: tuple[int, ...], *, dtype: torch.dtype) -> Tensor:
        """What torch.empty is to native calls."""
        count = math.prod(size)
        block = torch.full((64 + count + 64,), float("nan"), dtype=dtype)
        out = block[64 : 64 + count].view(size)
        self._blocks.append((block, out))
        return out

    def check(self) -> int:
        """How many results there were. All of each was written, and nothing around it."""
        for block, out in self._blocks:
            assert not out.isnan().any(), "an element was not written"
            around = torch.cat([block[:64], block[64 + out.numel() :]])
            assert around.isnan().all(), "memory outside of the result was written"
        return len(self._blocks)


@pytest.fixture
def guarded_results(monkeypatch):
    """Native calls return memory that notices what is written around it, until the test ends."""
    results = _GuardedResults()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", results.empty)
        assert call.set_up(exports=False) is None
    yield results
    call.set_up()
