"""The layers that methods are timed on: of each kind the frozen layer, what a call of it gets, and its work.

M rows of K inputs and N outputs are positions and channels of a convolution, ids, vocabulary and columns of an embedding,
and tokens, hidden and intermediate size of a mixture of experts.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from peftkern.methods import Method

from .core.case import PASSES, Case, Floor
from .peers.data import frozen_linear, make_data


@dataclass
class Data:
    """What the providers of a block share, one of each per copy: the arguments of a call, the tensors that the frozen layer
    is made of, and the output's gradient."""

    args: list[tuple[Tensor, ...]]
    weights: list[tuple[Tensor, ...]]
    dy: list[Tensor]
    made: dict = field(default_factory=dict)

    def leaves(self, i: int) -> list[Tensor]:
        """The arguments that get a gradient."""
        return [t for t in self.args[i] if t.requires_grad]

    def to(self, dtype: torch.dtype) -> Data:
        """The same with all floats in this dtype, itself if they are."""
        if self.dy[0].dtype == dtype:
            return self
        if dtype not in self.made:
            parts = ([tuple(_cast(t, dtype) for t in each) for each in part] for part in (self.args, self.weights))
            self.made[dtype] = Data(*parts, [_cast(dy, dtype) for dy in self.dy])
        return self.made[dtype]


def _cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t.detach().to(dtype).requires_grad_(t.requires_grad) if t.is_floating_point() else t


class Layer:
    """A linear layer, and what other kinds have in common with it.

    Attributes:
        what: tells it from other layers of its kind. shapes: (M, K, N). passes: of the frozen layer. drops: whether
            adapters of such a layer may drop. shared: whether two layers may hold one frozen weight. compute: as
            ``peftkern.accelerate`` takes it.
    """

    what = ""
    shapes: tuple[tuple[int, int, int], ...] = ((2048, 4096, 4096), (1280, 1536, 2304))
    passes = PASSES
    drops = shared = True
    compute: str | None = None

    def data(self, case: Case, copies: int) -> Data:
        """Random tensors of a case."""
        made = make_data(case, copies)
        return Data([(x,) for x in made.x], [(w,) for w in made.weight], made.dy)

    def frozen(self, *weights: Tensor) -> nn.Module:
        """The frozen layer, made of these very tensors."""
        return frozen_linear(*weights)

    def adapted(self, *weights: Tensor) -> nn.Module:
        """The layer that adapters are put on: the frozen one."""
        return self.frozen(*weights)

    def call(self, module: nn.Module, args: tuple[Tensor, ...]) -> Tensor:
        """What the frozen layer makes of the arguments of a call."""
        return module(*args)

    def exact(self, model: nn.Module) -> nn.Module:
        """A copy of the library's model that computes in fp64."""
        return copy.deepcopy(model).double()

    def floor(self, case: Case, which: str) -> Floor:
        """Of the layer that adapters are put on: what a method needs beside it is the method's own affair."""
        return self.frozen_floor(case, which)

    def frozen_floor(self, case: Case, which: str) -> Floor:
        """Of the frozen layer."""
        passes, (products, elements) = 1 if which == "fwd" else 2, self.work(case)
        return Floor(2.0 * passes * products, 0.0, float(case.dtype.itemsize * passes * elements), 0.0)

    def work(self, case: Case) -> tuple[int, int]:
        """Products of a pass, and elements that it reads or writes."""
        M, K, N = case.shape
        return M * K * N, M * K + K * N + M * N


class _Random:
    # Numbers of the same law whatever the case.
    def __init__(self, case: Case):
        self.case, self.generator = case, torch.Generator(case.device).manual_seed(0)

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        made = torch.randn(*shape, generator=self.generator, device=self.case.device)
        return made.mul_(scale).to(self.case.dtype)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator, device=self.case.device)


class Convolution(Layer):
    """A convolution of square images, the largest ones of up to 64 x 64 that M is a multiple of, with a square kernel."""

    shapes = ((4096, 320, 320), (2048, 640, 640))  # of latent diffusion models

    def __init__(self, side: int):
        self.side, self.what = side, f"{side}x{side}"

    def data(self, case: Case, copies: int) -> Data:
        (M, K, N), random = case.shape, _Random(case)
        side = max(n for n in range(1, 65) if M % (n * n) == 0)
        images = M // side**2, side, side
        return Data(
            [(random.normal(images[0], K, *images[1:]).requires_grad_(),) for _ in range(copies)],
            [(random.normal(N, K, *(self.side,) * 2, scale=(self.side**2 * K) ** -0.5),) for _ in range(copies)],
            [random.normal(images[0], N, *images[1:]) for _ in range(copies)],
        )

    def frozen(self, *weights: Tensor) -> nn.Module:
        (weight,) = weights
        N, K, side, _ = weight.shape
        return _holding(nn.Conv2d(K, N, side, padding=side // 2, bias=False, device="meta"), weight=weight)

    def work(self, case: Case) -> tuple[int, int]:
        (M, K, N), taps = case.shape, self.side**2
        return M * K * N * taps, M * K + K * N * taps + M * N


class Embedding(Layer):
    """An embedding, whose ids and table get no gradient."""

    shapes = ((2048, 32000, 4096), (1280, 30522, 768))  # of Llama 2 and BERT
    passes = PASSES[:1]
    drops = False

    def data(self, case: Case, copies: int) -> Data:
        (M, V, N), random = case.shape, _Random(case)
        return Data(
            [(random.uniform(M).mul_(V).long(),) for _ in range(copies)],
            [(random.normal(V, N),) for _ in range(copies)],
            [random.normal(M, N) for _ in range(copies)],
        )

    def frozen(self, *weights: Tensor) -> nn.Module:
        return nn.Embedding.from_pretrained(*weights)

    def work(self, case: Case) -> tuple[int, int]:
        return 0, 2 * case.M * case.N


class Experts(Layer):
    """The experts of a mixture with gates, of which each token has two, in one of transformers' implementations."""

    shapes = ((512, 1024, 2048),)
    drops = False
    top = 2

    def __init__(self, experts: int, implementation: str):
        self.experts, self.implementation = experts, implementation
        self.what = f"{experts}, {implementation}"

    def data(self, case: Case, copies: int) -> Data:
        (M, K, N), E, random = case.shape, self.experts, _Random(case)
        args = []
        for _ in range(copies):
            weights, index = random.uniform(M, E).topk(self.top)
            args.append((random.normal(M, K).requires_grad_(), index, weights.to(case.dtype)))
        weights = [
            (random.normal(E, 2 * N, K, scale=K**-0.5), random.normal(E, K, N, scale=N**-0.5)) for _ in range(copies)
        ]
        return Data(args, weights, [random.normal(M, K) for _ in range(copies)])

    def frozen(self, *weights: Tensor) -> nn.Module:
        from transformers.models.mixtral.modeling_mixtral import MixtralExperts

        up, down = weights
        E, K, N = down.shape
        config = SimpleNamespace(
            num_local_experts=E, hidden_size=K, intermediate_size=N, hidden_act="silu",
            _experts_implementation=self.implementation,
        )  # fmt: skip
        with torch.device("meta"):
            experts = MixtralExperts(config)
        return _holding(experts, gate_up_proj=up, down_proj=down)

    def exact(self, model: nn.Module) -> nn.Module:
        model = super().exact(model)
        for module in model.modules():
            if isinstance(getattr(module, "config", None), SimpleNamespace):
                module.config._experts_implementation = "eager"  # others know no fp64
        return model

    def work(self, case: Case) -> tuple[int, int]:
        M, K, N = case.shape
        return 3 * self.top * M * K * N, 2 * M * K + 3 * min(self.experts, self.top * M) * K * N


def _holding(module: nn.Module, **tensors: Tensor) -> nn.Module:
    for name, t in tensors.items():
        setattr(module, name, nn.Parameter(t, requires_grad=False))
    return module


# By what an entry of the registry calls its kind of layers.
LAYERS: dict[str, tuple[Layer, ...]] = {
    "convolutions": (Convolution(1), Convolution(3)),
    "embeddings": (Embedding(),),
    "experts": tuple(Experts(E, implementation) for E in (8, 64) for implementation in ("grouped_mm", "eager")),
}


def layers_of(method: Method) -> tuple[Layer, ...]:
    """The layers that a method is timed on."""
    return LAYERS[method.name.removeprefix(f"{method.of} of ")] if method.of else (Layer(),)
