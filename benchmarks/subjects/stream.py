"""A method of the residual stream: a library's module, or the same in torch's own steps where the library is not installed,
and our function on the module's very parameters.

Both stand alone and are compared with a frozen linear layer (H, H) that reads the same h (B, T, H). Parameters have h's dtype,
as the libraries want them, but for orthogonal ones.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from peftkern.methods import STREAM, StreamMethod
from peftkern.testing.residual import EXAMPLES, Example

from ..core.case import Case
from ..core.presets import Choice, Entry
from ..layers import Data, Layer
from ..peers.data import make_data
from .subject import Pair, installed, trained

BASE, LARGE = (1024, 768, 48), (2048, 1024, 64)
# Which forms of an entry are timed: rows, hidden size and width of the bottleneck, which is the configuration's own.
TIMED: dict[str, dict[str, tuple[tuple[int, int, int], ...]]] = {
    "bottleneck adapter": {
        "seq_bn, gelu": (BASE, LARGE, (2048, 4096, 256)),
        "seq_bn": (BASE, LARGE),
        "double_seq_bn": (BASE, LARGE),
        "par_bn": ((1024, 768, 384), (2048, 1024, 512)),
        "scaled_par_bn": ((1024, 768, 384),),
        "adapterplus": ((1024, 768, 8), (2048, 1024, 10)),
        "unipelt": (BASE,),
    },
    "Compacter": {"compacter": ((1024, 768, 24), (2048, 1024, 32))},
    "invertible": {"nice": ((1024, 768, 192), (2048, 1024, 256))},
    "AdapterFusion": {"dynamic": ((1024, 768, 0),)},
    "LoReFT": {"pyreft": ((2048, 1024, 4), (2048, 4096, 4)), "adapters": ((2048, 1024, 4),)},
    **{name: {"pyreft": ((2048, 1024, 4),)} for name in ("NoReFT", "DiReFT", "NodiReFT", "ConsReFT", "LobiReFT")},
}


class Stream(Layer):
    """The frozen linear layer beside, which reads h alone."""

    def __init__(self, residual: bool):
        self.residual = residual

    def data(self, case: Case, copies: int) -> Data:
        made, tokens = make_data(case, copies), math.gcd(case.M, 512 if case.M >= 2048 else 128)

        def sequences(t: Tensor) -> Tensor:
            return t.detach().view(-1, tokens, t.shape[-1]).requires_grad_(t.requires_grad)

        args = []
        for x in made.x:
            h = sequences(x)
            args.append((h, h.detach().flip(1).requires_grad_()) if self.residual else (h,))
        return Data(args, [(w,) for w in made.weight], [sequences(dy) for dy in made.dy])

    def call(self, module: nn.Module, args: tuple[Tensor, ...]) -> Tensor:
        return module(args[0])


class StreamSubject(NamedTuple):
    """An entry of the registry and the form that is timed."""

    method: StreamMethod
    form: str

    on_layer = False

    @property
    def name(self) -> str:
        return f"{self.method.name}, {self.form}"

    @property
    def op(self) -> str:
        return self.method.op

    @property
    def example(self) -> Example:
        return EXAMPLES[self.method.name][self.form]

    @property
    def layer(self) -> Layer:
        return Stream(self.example.residual)

    @property
    def beside(self) -> str:
        return self.example.library if installed(self.example.library) else "torch"

    def entries(self) -> tuple[Entry, ...]:
        # AdapterHub's ReFT takes no h in half precision.
        options = {"dtypes": ("fp32",)} if self.form == "adapters" else {}
        return tuple(Entry(M, H, H, R=(R,), **options) for M, H, R in TIMED[self.method.name][self.form])

    def choice(self, asked: Choice) -> Choice:
        """Without dropout, and adapters in the dtype of h."""
        ranks = asked.ranks if all(R for *_, R in TIMED[self.method.name][self.form]) else None
        return dataclasses.replace(asked, dtypes=asked.dtypes or ("fp32",), ranks=ranks, dropouts=None, adapters=None)

    def missing(self) -> str | None:
        return None

    def small(self, case: Case) -> Case:
        return dataclasses.replace(case, M=48, K=160, N=160, R=min(case.R, 16), dropout=0.0)

    def pair(self, case: Case, weights: tuple[Tensor, ...]) -> Pair:
        example = self.example
        make = example.plain if self.beside == "torch" else example.make
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module = make(case.K, case.R, case.dtype).to(case.device).train()

        def bound(compute, module: nn.Module):
            # What stands alone has h itself as its residual.
            return lambda h, residual=None: compute(module, h, h if residual is None else residual)

        def exact():
            wide = copy.deepcopy(module).double()
            return bound(example.stock, wide), trained(wide)

        return Pair(
            (bound(example.stock, module), bound(example.ours, module)), (trained(module), trained(module)),
            [*module.parameters(), *module.buffers()], exact,
        )  # fmt: skip


def subjects(name: str) -> list[StreamSubject]:
    """The forms of an entry that are timed."""
    return [StreamSubject(STREAM[name], form) for form in TIMED[name]]
