"""The calls that the GPU tests make, as functions of fixed tensors: what a graph, a stream or a sanitizer runs.

On a CPU they run too, through the reference: tests/test_gpu_calls.py sees to it that a GPU's time is not lost to them.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

import peftkern
from peftkern import settings
from peftkern.bases.base import Base
from peftkern.dispatch import choose
from peftkern.testing.bases import drawn

M, N, K, R = 96, 264, 200, 16
COUNT = 6


@contextlib.contextmanager
def using(backend: str) -> Iterator[None]:
    """``cuda``: its kernels take all that they can, others the rest. Other names: that back end takes every call."""
    with settings.using(backend="auto", candidate="cuda") if backend == "cuda" else settings.using(backend=backend):
        yield


@dataclass
class Call:
    """``run()`` computes ``results`` from ``inputs``, tensors whose values may be changed in place between runs."""

    name: str
    inputs: dict[str, Tensor]
    compute: Callable[[dict[str, Tensor]], list[Tensor]]
    ops: tuple[str, ...] = field(default=())

    def run(self) -> list[Tensor]:
        """Fresh tensors."""
        return self.compute(self.inputs)


def _normal(device: str, dtype: torch.dtype, seed: int) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def make(*shape: int, scale: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator).mul_(scale).to(dtype).to(device)

    return make


def _training(device: str, dtype: torch.dtype, adapter_dtype: torch.dtype, drop: float) -> Call:
    make = _normal(device, dtype, 1)
    inputs = dict(
        x=make(M, K), weight=make(N, K, scale=K**-0.5), A=make(R, K, scale=K**-0.5, dtype=adapter_dtype),
        B=make(N, R, scale=R**-0.5, dtype=adapter_dtype), bias=make(N), dy=make(M, N),
        seed=torch.tensor([77], device=device),
    )  # fmt: skip

    def compute(t):
        leaves = [t[k].detach().requires_grad_() for k in ("x", "A", "B")]
        y = peftkern.lora_linear(
            leaves[0], t["weight"], *leaves[1:], bias=t["bias"], scaling=2.0, dropout_p=drop, training=True,
            seed=t["seed"],
        )  # fmt: skip
        return [y.detach(), *torch.autograd.grad(y, leaves, t["dy"])]

    ops = "lora_linear_fwd", "lora_linear_bwd"
    return Call(f"lora_linear-{'dropout' if drop else 'plain'}", inputs, compute, ops)


def _adapters(make, adapter_dtype: torch.dtype) -> dict[str, Tensor]:
    found = {}
    for i in range(COUNT):
        rank = (R, 8, 1, 24, 5, R)[i]
        found[f"A{i}"] = make(rank, K, scale=K**-0.5, dtype=adapter_dtype)
        found[f"B{i}"] = make(N, rank, scale=rank**-0.5, dtype=adapter_dtype)
    return found


def _many(device: str, dtype: torch.dtype, adapter_dtype: torch.dtype) -> Call:
    make = _normal(device, dtype, 2)
    inputs = dict(x=make(M, K), weight=make(N, K, scale=K**-0.5), ids=torch.arange(M, device=device) % (COUNT + 1) - 1)
    inputs |= _adapters(make, adapter_dtype)

    def compute(t):
        with torch.inference_mode():
            pairs = [(t[f"A{i}"], t[f"B{i}"], 1.0 + i) for i in range(COUNT)]
            # A view is another tensor: its route is made inside the call, of the ids as they are then.
            return [peftkern.multi_lora_linear(t["x"], t["weight"], pairs, t["ids"].view(-1))]

    return Call("multi_lora_linear", inputs, compute, ("multi_lora_linear_route", "multi_lora_linear_fwd"))


# Vectors of the adapters of one batch, as methods have them; the last one has no matrices.
_OWN = (
    ("base_out_scale", "delta_out_scale"), ("rank_scale", "delta_out_scale"), (), ("bias",), ("rank_scale", "delta_in_scale"),
    ("base_in_scale", "bias"),
)  # fmt: skip


def _methods(device: str, dtype: torch.dtype, adapter_dtype: torch.dtype) -> Call:
    make = _normal(device, dtype, 5)
    inputs = dict(x=make(M, K), weight=make(N, K, scale=K**-0.5), bias=make(N))
    inputs |= dict(ids=torch.arange(M, device=device) % (COUNT + 1) - 1) | _adapters(make, adapter_dtype)
    for i, names in enumerate(_OWN):
        sizes = {"rank_scale": inputs[f"A{i}"].shape[0], "base_in_scale": K, "delta_in_scale": K}
        inputs |= {f"{name}{i}": make(sizes.get(name, N), dtype=torch.float32) for name in names}

    def compute(t):
        adapters = []
        for i, names in enumerate(_OWN):
            matrices = (None, None) if i == COUNT - 1 else (t[f"A{i}"], t[f"B{i}"])
            adapters.append(peftkern.Adapter(*matrices, 1.0 + i, **{name: t[f"{name}{i}"] for name in names}))
        with torch.inference_mode():
            return [peftkern.multi_lora_linear(t["x"], t["weight"], adapters, t["ids"].view(-1), bias=t["bias"])]

    return Call("multi_lora_linear-vectors", inputs, compute, ("multi_lora_linear_route", "multi_lora_linear_fwd"))


def _branch(device: str, dtype: torch.dtype, adapter_dtype: torch.dtype) -> Call:
    make = _normal(device, dtype, 3)
    inputs = dict(x=make(M, K), y=make(M, N), ids=torch.arange(M, device=device) % (COUNT + 1) - 1)
    bank = peftkern.AdapterBank(K, N, max_adapters=COUNT, max_rank=24, dtype=adapter_dtype, device=device)
    weights = _adapters(make, adapter_dtype)
    numbers = [bank.add(str(i), weights[f"A{i}"], weights[f"B{i}"], 1.0 + i) for i in range(COUNT)]
    inputs["numbers"] = torch.tensor([*numbers, -1], device=device)

    def compute(t):
        with torch.inference_mode():
            out = t["y"].clone()
            peftkern.sgmv(t["x"], bank, t["numbers"][t["ids"]], out=out)
            return [out]

    return Call("sgmv", inputs, compute, ("multi_lora_linear_route", "sgmv_add"))


def _norm(device: str, dtype: torch.dtype, adapter_dtype: torch.dtype) -> Call:
    make = _normal(device, dtype, 4)
    inputs = dict(weight=make(N, K), A=make(R, K, dtype=adapter_dtype), B=make(N, R, dtype=adapter_dtype))

    def compute(t):
        return [torch.ops.peftkern.lora_row_norm([t["weight"]], "dense", t["A"], t["B"], 0.5)]

    return Call("lora_row_norm", inputs, compute, ("lora_row_norm",))


def _bottleneck(device: str, dtype: torch.dtype, adapter_dtype: torch.dtype) -> Call:
    make = _normal(device, dtype, 6)
    inputs = dict(
        h=make(M, K), down=make(R, K, scale=K**-0.5, dtype=adapter_dtype), up=make(K, R, scale=R**-0.5, dtype=adapter_dtype),
        down_bias=make(R, dtype=torch.float32), up_bias=make(K, dtype=torch.float32), gate=make(M, 1, dtype=torch.float32),
        dy=make(M, K), seed=torch.tensor([78], device=device),
    )  # fmt: skip

    def compute(t):
        leaves = {k: v.detach().requires_grad_() for k, v in t.items() if k not in ("dy", "seed")}
        y = peftkern.bottleneck_adapter(
            **leaves, activation="gelu", scaling=2.0, dropout_p=0.25, training=True, seed=t["seed"]
        )
        return [y.detach(), *torch.autograd.grad(y, list(leaves.values()), t["dy"])]

    return Call("bottleneck_adapter", inputs, compute, ("bottleneck_adapter_fwd", "bottleneck_adapter_bwd"))


def _codes(device: str, dtype: torch.dtype, adapter_dtype: torch.dtype) -> Call:
    """Few rows over weights in codes: whole runs of 16 bytes, and not."""
    make, few, deep = _normal(device, dtype, 7), 48, 256
    inputs = dict(
        x=make(few, deep), A=make(R, deep, scale=deep**-0.5, dtype=adapter_dtype),
        B=make(N, R, scale=R**-0.5, dtype=adapter_dtype),
    )  # fmt: skip
    held = {kind: drawn(kind, N, deep, 7, device) for kind in ("nf4", "int8")}
    inputs |= {f"{kind}{i}": t for kind, base in held.items() for i, t in enumerate(base.tensors)}

    def compute(t):
        with torch.inference_mode():
            nf4, int8 = Base("nf4", (t["nf40"], t["nf41"])), Base("int8", (t["int80"][:, :K], t["int81"]))
            whole = peftkern.lora_linear(t["x"], nf4, t["A"], t["B"], scaling=2.0)
            return [whole, peftkern.lora_linear(t["x"][:, :K], int8, t["A"][:, :K], t["B"], scaling=2.0)]

    return Call("lora_linear-codes", inputs, compute, ("lora_linear_fwd",))


def _mask(device: str) -> Call:
    def compute(t):
        return [torch.ops.peftkern.dropout_mask(t["seed"], M, K, 0.3)]

    return Call("dropout_mask", dict(seed=torch.tensor([5], device=device)), compute, ("dropout_mask",))


def calls(device: str, dtype: torch.dtype = torch.bfloat16, adapter_dtype: torch.dtype = torch.float32) -> list[Call]:
    """All of them."""
    return [
        _training(device, dtype, adapter_dtype, 0.0), _training(device, dtype, adapter_dtype, 0.25),
        _many(device, dtype, adapter_dtype), _methods(device, dtype, adapter_dtype), _branch(device, dtype, adapter_dtype),
        _norm(device, dtype, adapter_dtype), _bottleneck(device, dtype, adapter_dtype), _codes(device, dtype, adapter_dtype),
        _mask(device),
    ]  # fmt: skip


NAMES = (
    "lora_linear-plain", "lora_linear-dropout", "multi_lora_linear", "multi_lora_linear-vectors", "sgmv", "lora_row_norm",
    "bottleneck_adapter", "lora_linear-codes", "dropout_mask",
)  # fmt: skip


def call(name: str, device: str = "cuda", **kinds) -> Call:
    """The call of that name."""
    return next(c for c in calls(device, **kinds) if c.name == name)


def change(call: Call) -> None:
    """Other values in the same memory: data, adapter ids and dropout seeds."""
    for key, t in call.inputs.items():
        if key == "ids":
            t.copy_(t.flip(0))
        elif key == "seed":
            t.add_(1)
        elif t.is_floating_point():
            t.mul_(-0.5)


def unable(call: Call, backend: str) -> str | None:
    """Why ``backend`` has no kernel for a part of the call, so that a test of it would test another."""
    if backend == "reference":
        return None
    module = choose.load(backend)
    reason = module.unavailable(settings.current())
    missing = [op for op in call.ops if op not in module.OPS]
    if backend == "cuda":  # others may take a part
        missing = missing if len(missing) == len(call.ops) else []
    return reason or (f"{backend} has no kernel for {', '.join(missing)}" if missing else None)


def main(argv: list[str]) -> int:
    """Runs every call twice on ``argv[1]`` with the back end ``argv[0]``: what a sanitizer watches."""
    backend, device = argv
    with using(backend):
        for each in calls(device):
            reason = unable(each, backend)
            print(f"{each.name}: {reason or 'runs'}")
            for _ in range(0 if reason else 2):
                assert all(r.isfinite().all() for r in each.run())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
