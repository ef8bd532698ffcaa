"""The benchmark of ``lora_linear``: shapes, providers, and what each is timed on.

Providers: the frozen nn.Linear in the activation's dtype and in fp32; HF PEFT as users run it (fp32 adapters on any
base), with adapters in the base's dtype, and under torch.compile; the ``addmm_`` function (addmm.py) and the split of
the graph at the rank-sized products (split.py), two published designs; peftkern, and on a GPU each of its ways
(candidates.py).
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import peftkern

from ..core.case import BASE, FP32_BASE, Bench, Case, Provider, Step
from ..core.floor import lora_floor
from ..measure.device_timing import rotation
from ..peers import candidates
from ..peers import check as peer_check
from ..peers.addmm import addmm_lora
from ..peers.split import split_lora

SCALING = 2.0
OPS = ("lora_linear_fwd", "lora_linear_bwd_adapter", "lora_linear_bwd_input")
FULL = [(512, 1024, 1024), (2048, 1024, 1024), (2048, 4096, 4096), (1024, 4096, 14336), (1024, 14336, 4096),
        (16, 4096, 4096), (1, 4096, 4096)]  # fmt: skip
QUICK = [(512, 1024, 1024), (1024, 2048, 2048), (16, 4096, 4096)]
# What the limits for machines with a slow half-precision product are stated on, besides the shapes above.
HALF_EXTRA = [(192, 768, 1024), (4, 4096, 4096)]
PRESETS = {
    "quick": dict(shapes=QUICK, dtypes=("fp32", "bf16"), ranks=(16,), dropouts=(0.0, 0.1), adapters=("fp32",)),
    "full": dict(
        shapes=FULL, dtypes=("fp32", "bf16"), ranks=(8, 16, 64), dropouts=(0.0, 0.1), adapters=("fp32", "same")
    ),
    "gpu": dict(
        shapes=[(M, 4096, N) for M in (8192, 2048, 512) for N in (4096, 14336)],
        dtypes=("bf16",),
        ranks=(16,),
        dropouts=(0.0, 0.1),
        adapters=("fp32", "same"),
    ),
}


@dataclass
class Data:
    """Tensors that the providers of a block share, one of each per copy; adapters are made once per (R, dtype)."""

    case: Case
    x: list[Tensor]
    weight: list[Tensor]
    dy: list[Tensor]
    made: dict = field(default_factory=dict)

    def adapters(self, R: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """lora_A (R, K) and lora_B (N, R), both trainable and both random: a zero B would hide work and errors."""
        if (R, dtype) not in self.made:
            generator = torch.Generator(self.case.device).manual_seed(R)
            make = functools.partial(torch.randn, generator=generator, device=self.case.device)
            A = make(R, self.case.K).mul_(self.case.K**-0.5).to(dtype).requires_grad_()
            B = make(self.case.N, R).mul_(R**-0.5).to(dtype).requires_grad_()
            self.made[R, dtype] = A, B
        return self.made[R, dtype]

    def as_fp32(self) -> Data:
        """The same data in fp32 (itself if it already is)."""
        if self.case.dtype == torch.float32:
            return self
        if "fp32" not in self.made:
            convert = [[t.detach().float() for t in part] for part in (self.x, self.weight, self.dy)]
            self.made["fp32"] = Data(self.case, [x.requires_grad_() for x in convert[0]], *convert[1:])
        return self.made["fp32"]


def make_data(case: Case, copies: int) -> Data:
    """x (M, K) that requires grad, weight (N, K), dy (M, N), ``copies`` of each."""
    generator = torch.Generator(case.device).manual_seed(0)

    def make(rows: int, cols: int, scale: float = 1.0) -> Tensor:
        return torch.randn(rows, cols, generator=generator, device=case.device).mul_(scale).to(case.dtype)

    return Data(
        case,
        [make(case.M, case.K).requires_grad_() for _ in range(copies)],
        [make(case.N, case.K, case.K**-0.5) for _ in range(copies)],
        [make(case.M, case.N) for _ in range(copies)],
    )


def copies(case: Case, cache_bytes: int) -> int:
    """With few rows the time is that of reading W, and in a real model each layer's W comes from memory, not from a
    cache: take turns over enough copies to exceed the last cache twice (eight at most). With many rows, or a W that
    is small itself, one copy. On a GPU, where a layer takes less time than its cache takes to turn over, always."""
    if case.device == "cuda":
        return rotation((case.M * (case.K + case.N) + case.K * case.N) * case.dtype.itemsize, cache_bytes)
    weight = case.K * case.N * case.dtype.itemsize
    return 1 if case.M > 64 or weight < 1 << 20 else max(1, min(8, -(-2 * cache_bytes // weight)))


def _frozen_linear(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def _base(case: Case, data: Data) -> Step:
    layers = [_frozen_linear(w) for w in data.weight]
    return Step(lambda i: layers[i](data.x[i]), [[x] for x in data.x], data.dy, data.weight)


def _peft_layers(case: Case, data: Data, *, autocast: bool) -> tuple[list[nn.Module], list[list[Tensor]]]:
    import peft

    config = peft.LoraConfig(
        r=case.R, lora_alpha=SCALING * case.R, lora_dropout=case.dropout, target_modules=["0"], bias="none"
    )
    layers, leaves = [], []
    for weight, x in zip(data.weight, data.x):
        wrapped = nn.Sequential(_frozen_linear(weight))
        wrapped.config = None  # PEFT looks for a transformers config
        model = peft.get_peft_model(wrapped, config, autocast_adapter_dtype=autocast)
        layer = model.base_model.model[0].train()
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        with torch.no_grad():
            for mine, theirs in zip(data.adapters(case.R, case.adapter_dtype), (A, B)):
                theirs.copy_(mine)
        assert A.dtype == B.dtype == case.adapter_dtype, (A.dtype, case.adapter_dtype)
        layers.append(layer)
        leaves.append([x, A, B])
    return layers, leaves


def _peft(case: Case, data: Data) -> Step:
    layers, leaves = _peft_layers(case, data, autocast=case.adapter_dtype != case.dtype)
    frozen = [*data.weight, *(t for part in leaves for t in part[1:])]
    return Step(lambda i: layers[i](data.x[i]), leaves, data.dy, frozen)


def _peft_compiled(case: Case, data: Data) -> Step:
    # Each case starts from an empty cache: torch gives up compiling a function after eight variants.
    torch._dynamo.reset()
    layers, leaves = _peft_layers(case, data, autocast=case.adapter_dtype != case.dtype)
    compiled = [torch.compile(layer, dynamic=False) for layer in layers]
    frozen = [*data.weight, *(t for part in leaves for t in part[1:])]
    return Step(lambda i: compiled[i](data.x[i]), leaves, data.dy, frozen)


def _addmm(case: Case, data: Data) -> Step:
    A, B = data.adapters(case.R, case.adapter_dtype)
    leaves = [[x, A, B] for x in data.x]
    forward = lambda i: addmm_lora(data.x[i], data.weight[i], A, B, SCALING, case.dropout)  # noqa: E731
    return Step(forward, leaves, data.dy, [*data.weight, A, B])


def _split(case: Case, data: Data) -> Step:
    A, B = data.adapters(case.R, case.adapter_dtype)
    forward = lambda i: split_lora(data.x[i], data.weight[i], A, B, SCALING, case.dropout)  # noqa: E731
    return Step(forward, [[x, A, B] for x in data.x], data.dy, [*data.weight, A, B])


def _ours(case: Case, data: Data) -> Step:
    A, B = data.adapters(case.R, case.adapter_dtype)

    def forward(i: int) -> Tensor:
        return peftkern.lora_linear(
            data.x[i], data.weight[i], A, B, scaling=SCALING, dropout_p=case.dropout, training=True
        )

    return Step(forward, [[x, A, B] for x in data.x], data.dy, [*data.weight, A, B])


def _no_peft() -> str | None:
    return None if importlib.util.find_spec("peft") else "peft is not installed (pip install 'peftkern[bench]')"


PROVIDERS = {
    p.name: p
    for p in (
        Provider(BASE, "frozen linear", _base),
        Provider(FP32_BASE, "frozen linear, fp32", lambda case, data: _base(case, data.as_fp32())),
        Provider("peft", "PEFT", _peft, _no_peft),
        Provider("peft_compile", "PEFT compiled", _peft_compiled, _no_peft, probe_as="peft", warm_steps=2),
        Provider("addmm", "addmm_ function", _addmm),
        Provider("split", "split", _split),
        Provider("peftkern", "peftkern", _ours, gated=True),
        *(
            Provider(
                f"peftkern_{way.suffix}", f"peftkern: {way.title}", _ours, gated=True,
                unusable=candidates.unusable(way, OPS), around=functools.partial(candidates.active, way),
            )
            for way in candidates.LINEAR
        ),
    )
}  # fmt: skip


def cases(
    preset: str, device: str, *, dtypes=None, shapes=None, ranks=None, dropouts=None, adapters=None
) -> list[Case]:
    """The preset's cases, each list replaced by the given one. Adapter dtypes are ``fp32``, ``same`` or a name."""
    from ..core.case import DTYPES

    chosen = PRESETS[preset]
    out = []
    for name in dtypes or chosen["dtypes"]:
        dtype = DTYPES[name]
        extra = HALF_EXTRA if preset == "full" and dtype.itemsize == 2 else []
        for shape in shapes or [*chosen["shapes"], *extra]:
            for R in ranks or ((16,) if shape in extra and not shapes else chosen["ranks"]):
                kinds = {dtype if a == "same" else DTYPES[a] for a in adapters or chosen["adapters"]}
                for adapter in sorted(kinds & {torch.float32, dtype}, key=lambda d: -d.itemsize):
                    for dropout in dropouts if dropouts is not None else chosen["dropouts"]:
                        out.append(Case("lora_linear", device, dtype, adapter, *shape, R, dropout))
    return out


def plan(case: Case, preset: str) -> list[str]:
    """The providers of a case. PEFT, which R and the adapter's dtype hardly slow down, is left out where it says
    nothing new, so that a full run ends in a quarter of an hour; ``--provider`` asks for all of them."""
    if case.device == "cuda":
        # A compiler's minute for one case is enough.
        users = case.adapter_dtype == torch.float32 and case.dropout and case.shape == (8192, 4096, 4096)
        ways = [f"peftkern_{way.suffix}" for way in candidates.LINEAR]
        return ["peft", *(["peft_compile"] if users else []), "addmm", "split", "peftkern", *ways]
    names = ["addmm", "peftkern"]
    users = case.adapter_dtype == torch.float32
    big = case.M * case.K * case.N > 2**35
    if (users and case.R <= 16) or case.R == 16:
        names.insert(0, "peft")
    if users and case.R == 16 and case.dropout and not big and (preset == "full" or case.M == 512):
        names.insert(1, "peft_compile")
    return names


def gate(case: Case) -> str | None:
    """Why peftkern's result for this kind of case is wrong, or None. Checked at a smaller size against fp64."""
    from peftkern.testing.accuracy import check
    from peftkern.testing.problems import LoRALinearProblem

    problem = LoRALinearProblem(
        seed=1, M=min(case.M, 192), K=min(case.K, 1024), N=min(case.N, 1024), R=case.R, dtype=case.dtype,
        adapter_dtype=case.adapter_dtype, scaling=SCALING, dropout_p=case.dropout,
    )  # fmt: skip
    bad = [f"{row.output} {row.ratio:.2f}x" for row in check(problem, case.device) if not row.ok]
    return f"failed the accuracy check ({', '.join(bad)} of the error bound)" if bad else None


def check(provider: Provider, case: Case) -> str | None:
    """Why a peer's result for this kind of case is wrong, or None: at a small size, against fp64."""
    build = PROVIDERS[provider.probe_as or provider.name].build
    small = dataclasses.replace(case, M=48, K=160, N=96, dropout=0.0)
    data = make_data(small, 1)
    A, B = data.adapters(case.R, case.adapter_dtype)
    x, A, B = (t.detach().double().requires_grad_() for t in (data.x[0], A, B))
    branch = SCALING * (x @ A.t()) @ B.t()
    y = x @ data.weight[0].double().t() + branch
    exact = [y.detach(), *torch.autograd.grad(y, (x, A, B), data.dy[0].double())]
    reason = peer_check.wrong(build(small, data), exact)
    if reason or not case.dropout:
        return reason
    data.weight[0].zero_()
    # Each kept element of x is divided by 1 - p: the variance of its part in y is p / (1 - p) times its square.
    columns = (SCALING * B @ A).square().sum(0)
    variance = case.dropout / (1 - case.dropout) * (x.square() @ columns).sum().item()
    return peer_check.wrong_dropout(
        build(dataclasses.replace(case, M=48, K=160, N=96), data), branch.detach(), variance
    )


BENCH = Bench("lora_linear", PROVIDERS, cases, make_data, plan, lora_floor, gate, copies, check=check)
