"""ReFT as pyreft and AdapterHub's ``adapters`` have it: a module that edits the rows given to it, listed ones of h."""

from __future__ import annotations

import functools
import importlib.util
import sys
from functools import partial
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from ...autograd.residual.reft import VARIANTS, reft
from ...nn.orthogonal import orthonormal
from .example import Example, randomised

LISTED = 4  # of the first and of the last tokens of each sequence
NAMES = {
    "LoReFT": "loreft", "NoReFT": "noreft", "DiReFT": "direft", "NodiReFT": "nodireft", "ConsReFT": "consreft",
    "LobiReFT": "lobireft",
}  # fmt: skip
ROTATES = ("loreft", "direft", "consreft", "lobireft")


def interventions() -> ModuleType:
    """pyreft's module of this name. The package itself imports ``datasets``, for which this is no reason to be installed."""
    name = "pyreft.interventions"
    if name not in sys.modules:
        folder = importlib.util.find_spec("pyreft").submodule_search_locations[0]
        spec = importlib.util.spec_from_file_location(name, f"{folder}/interventions.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[name] = module
    return sys.modules[name]


class Plain(nn.Module):
    """An intervention in torch's own steps, with the names of pyreft's, for rows (..., H)."""

    def __init__(self, variant: str, H: int, r: int, dtype: torch.dtype):
        super().__init__()
        self.variant = VARIANTS[variant]
        wide, self.dropout = torch.promote_types(dtype, torch.float32), nn.Dropout(0.0)
        if variant in ROTATES:
            self.rotate_layer = nn.Module()
            self.rotate_layer.weight = nn.Parameter(torch.eye(H, r, dtype=wide))
            parametrizations.orthogonal(self.rotate_layer)
        else:
            self.proj_layer = nn.Linear(H, r, bias=False, dtype=dtype)
        source = self.variant.source
        self.learned_source = nn.Linear(H, r, dtype=dtype) if source else nn.Parameter(torch.empty(r, dtype=wide))

    def forward(self, x: Tensor) -> Tensor:
        R = self.proj_layer.weight if hasattr(self, "proj_layer") else self.rotate_layer.weight.mT
        z = self.learned_source(x) if self.variant.source else self.learned_source
        z = z - F.linear(x.to(R.dtype), R) if self.variant.subtracts else z.to(R.dtype)
        return (x + z @ R).to(x.dtype)


def _plain(variant: str, H: int, r: int, dtype: torch.dtype) -> nn.Module:
    return _named(randomised(Plain(variant, H, r, dtype)), variant)


def _pyreft(variant: str, dropout: float, H: int, r: int, dtype: torch.dtype) -> nn.Module:
    cls = getattr(interventions(), f"{variant.capitalize()}Intervention")
    module = cls(embed_dim=H, low_rank_dimension=r, dtype=dtype, add_bias=False, dropout=dropout)
    module = module.double() if dtype == torch.float64 else module
    return _named(randomised(module), variant)


def _hub(variant: str, activation: str | None, dropout: float, H: int, r: int, dtype: torch.dtype) -> nn.Module:
    from adapters.methods.reft import ReftUnit

    unit = ReftUnit(H, r, variant in ROTATES, VARIANTS[variant].subtracts, activation, dropout).to(dtype)
    unit.act = activation or "identity"
    return _named(randomised(unit), variant)


def _named(module: nn.Module, variant: str) -> nn.Module:
    module.reft_variant = variant
    return module


@functools.lru_cache
def _positions(B: int, T: int) -> Tensor:
    few = min(LISTED, T // 2)
    return torch.cat([torch.arange(few), torch.arange(T - few, T)]).expand(B, -1).contiguous()


def _stock(module: nn.Module, h: Tensor, residual: Tensor) -> Tensor:
    at = _positions(*h.shape[:2])[..., None].expand(-1, -1, h.shape[-1])
    return h.scatter(1, at, module(h.gather(1, at)))


def _ours(module: nn.Module, h: Tensor, residual: Tensor, seed: int | None = None) -> Tensor:
    hub = hasattr(module, "projection")
    layer = module.projection if hub else getattr(module, "rotate_layer", None) or module.proj_layer
    if hasattr(layer, "parametrizations"):
        made = layer.parametrizations.weight
        rotate = orthonormal(made.original, getattr(made[0], "base", None))
        rotate = rotate if hub else rotate.mT
    else:
        rotate = layer.weight
    source = module.learned_source
    weight, bias = (source.weight, source.bias) if isinstance(source, nn.Linear) else (None, source)
    return reft(
        h, rotate, weight, bias, positions=_positions(*h.shape[:2]), variant=module.reft_variant,
        activation=getattr(module, "act", "identity"), dropout_p=module.dropout.p if hasattr(module, "dropout") else 0.0,
        training=module.training, seed=seed,
    )  # fmt: skip


def _examples(variant: str) -> dict[str, Example]:
    dropout = 0.0 if variant == "consreft" else 0.3  # which has none in pyreft
    plain, theirs, hub = partial(_plain, variant), partial(_pyreft, variant), partial(_hub, variant)
    found = {"pyreft": Example("pyreft", partial(theirs, 0.0), plain, _stock, _ours)}
    if dropout:
        found["pyreft, dropout"] = Example("pyreft", partial(theirs, dropout), plain, _stock, _ours)
    if VARIANTS[variant].source:
        found["adapters"] = Example("adapters", partial(hub, None, 0.0), plain, _stock, _ours)
        found["adapters, relu, dropout"] = Example("adapters", partial(hub, "relu", 0.3), plain, _stock, _ours)
    return found


EXAMPLES = {name: _examples(variant) for name, variant in NAMES.items()}
