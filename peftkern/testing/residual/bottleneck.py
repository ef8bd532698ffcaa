"""Bottleneck adapters of AdapterHub's ``adapters``: by configuration string, with Kronecker products, and in couplings."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...autograd.residual.bottleneck_adapter import bottleneck_adapter
from ...nn.compositions import adapter_fusion, phm_weight
from ...nn.compositions.fusion import FusionWeights
from .example import Example, randomised

PHM = 4  # terms of a sum of Kronecker products, as in the library's configurations


class Plain(nn.Module):
    """A bottleneck adapter in torch's own steps, with the names of AdapterHub's. ``scaling``: a number, "learned" or
    "channel"."""

    def __init__(self, H: int, R: int, activation: str = "relu", scaling: float | str = 1.0, linear: type = nn.Linear):
        super().__init__()
        self.adapter_down, self.adapter_up = nn.Sequential(linear(H, R)), linear(R, H)
        sizes = {"learned": 1, "channel": H}
        self.scaling = nn.Parameter(torch.empty(sizes[scaling])) if scaling in sizes else scaling
        self.activation, self.use_gating, self.dropout = activation, False, nn.Dropout(0.0)

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor]:
        z = getattr(F, self.activation)(self.adapter_down(x))
        return (self.adapter_up(z) * self.scaling + residual,)


class PlainPHM(nn.Module):
    """x times a sum of Kronecker products, with the names of AdapterHub's ``PHMLayer``."""

    factorized_phm_rule, factorized_phm_W = True, True

    def __init__(self, K: int, N: int):
        super().__init__()
        shapes = {
            "phm_rule_left": (PHM, PHM, 1), "phm_rule_right": (PHM, 1, PHM),
            "W_left": (PHM, K // PHM, 1), "W_right": (PHM, 1, N // PHM), "b": (N,),
        }  # fmt: skip
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))

    def forward(self, x: Tensor) -> Tensor:
        pairs = zip(torch.bmm(self.phm_rule_left, self.phm_rule_right), torch.bmm(self.W_left, self.W_right))
        return x @ sum(torch.kron(*pair) for pair in pairs) + self.b


class PlainCoupling(nn.Module):
    """NICE's coupling of two halves, with the names of AdapterHub's."""

    def __init__(self, H: int, R: int):
        super().__init__()
        self.split_len1 = H // 2
        sizes = (H - H // 2, H // 2)
        self.F, self.G = (
            nn.Sequential(nn.Linear(a, R), nn.SiLU(), nn.Linear(R, b)) for a, b in (sizes, reversed(sizes))
        )

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.tensor_split([self.split_len1], -1)
        first = first + self.F(second)
        return torch.cat([first, second + self.G(first)], -1)


def config(name: str, **changes):
    """AdapterHub's configuration of the bottleneck adapters that this string stands for."""
    import adapters

    known = {**adapters.ADAPTER_CONFIG_MAP, "adapterplus": adapters.AdapterPlusConfig(stochastic_depth=0.0)}
    parts = getattr(known[name], "configs", [known[name]])
    return next(part for part in parts if isinstance(part, adapters.BnConfig)).replace(**changes)


def _make(name: str, changes: dict, H: int, R: int, dtype: torch.dtype) -> nn.Module:
    from adapters.methods import modeling

    found = config(name, **changes)
    module = (modeling.ParallelAdapter if found.is_parallel else modeling.Adapter)("a", H, R, found)
    module.activation = found.non_linearity  # which the library keeps as a function alone
    return randomised(module).to(dtype)


def _plain(cls: type, options: dict, H: int, R: int, dtype: torch.dtype) -> nn.Module:
    return randomised(cls(H, R, **options)).to(dtype)


def _stock(module: nn.Module, h: Tensor, residual: Tensor) -> Tensor:
    return module(h, residual)[0]


def _stock_parallel(module: nn.Module, h: Tensor, residual: Tensor) -> Tensor:
    # The layer around it adds the residual.
    y = module(h, residual)[0]
    return y if isinstance(module, Plain) else y + residual


def _weights(layer: nn.Module) -> tuple[Tensor, Tensor | None]:
    if isinstance(layer, nn.Linear):
        return layer.weight, layer.bias
    rule = (layer.phm_rule_left, layer.phm_rule_right) if layer.factorized_phm_rule else layer.phm_rule
    return phm_weight(rule, (layer.W_left, layer.W_right) if layer.factorized_phm_W else layer.W), layer.b


def _ours(module: nn.Module, h: Tensor, residual: Tensor, seed: int | None = None) -> Tensor:
    down, down_bias = _weights(
        next(layer for layer in module.adapter_down if next(layer.parameters(), None) is not None)
    )
    up, up_bias = _weights(module.adapter_up)
    each = isinstance(module.scaling, Tensor) and module.scaling.numel() > 1
    return bottleneck_adapter(
        h, down, up, down_bias=down_bias, up_bias=up_bias, activation=module.activation,
        scaling=1.0 if each else module.scaling, out_scale=module.scaling if each else None,
        residual=None if residual is h else residual,
        gate=torch.sigmoid(module.gate(h)).mean(1, keepdim=True) if module.use_gating else None,
        dropout_p=module.dropout.p, training=module.training, seed=seed,
    )  # fmt: skip


def _make_coupling(H: int, R: int, dtype: torch.dtype) -> nn.Module:
    from adapters.methods.modeling import NICECouplingBlock

    reduction = max(1, H // 2 // R)
    return randomised(NICECouplingBlock([[H]], non_linearity="swish", reduction_factor=reduction)).to(dtype)


def _coupling(module: nn.Module, h: Tensor, residual: Tensor, seed: int | None = None) -> Tensor:
    def net(layers: nn.Module, x: Tensor, other: Tensor) -> Tensor:
        down, up = (m for m in layers.modules() if isinstance(m, nn.Linear))
        return bottleneck_adapter(
            x, down.weight, up.weight, down_bias=down.bias, up_bias=up.bias, activation="silu", residual=other
        )

    first, second = h.tensor_split([module.split_len1], -1)
    first = net(module.F, second, first)
    return torch.cat([first, net(module.G, first, second)], -1)


class PlainFusion(nn.Module):
    """Attention over the outputs of adapters, with the names of AdapterHub's."""

    def __init__(self, H: int):
        super().__init__()
        self.query, self.key, self.value = nn.Linear(H, H), nn.Linear(H, H), nn.Linear(H, H, bias=False)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, residual: Tensor) -> Tensor:
        scores = (self.key(key) @ self.query(query).unsqueeze(-1)).squeeze(-1)
        return (torch.softmax(scores, -1).unsqueeze(-2) @ self.value(value)).squeeze(-2) + residual


def _make_fusion(name: str, H: int, R: int, dtype: torch.dtype) -> nn.Module:
    from adapters import AdapterFusionConfig
    from adapters.methods.modeling import BertFusion

    return _attention(BertFusion(AdapterFusionConfig.load(name), H, 0.0), dtype)


def _plain_fusion(H: int, R: int, dtype: torch.dtype) -> nn.Module:
    return _attention(PlainFusion(H), dtype)


def _attention(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    # What the bias of keys adds to all scores of a token alike changes nothing: its gradient is zero, but for rounding.
    module.key.bias.requires_grad_(False)
    return randomised(module, std=0.03).to(dtype)  # of large scores the softmax is nearly one of its inputs


def _outputs(h: Tensor, residual: Tensor) -> Tensor:
    # (B, T, A, H): what three adapters might put out.
    return torch.stack([h, residual, h + residual], -2)


def _stock_fusion(module: nn.Module, h: Tensor, residual: Tensor) -> Tensor:
    outputs = _outputs(h, residual)
    return module(h, outputs, outputs, residual)


def _fusion(module: nn.Module, h: Tensor, residual: Tensor, seed: int | None = None) -> Tensor:
    value = getattr(module, "value", None)
    weights = FusionWeights(
        module.query.weight, module.query.bias, module.key.weight, module.key.bias, value and value.weight
    )
    return adapter_fusion(h, _outputs(h, residual), residual, weights)


def _adapter(
    name: str, activation: str, scaling: float | str = 1.0, *, parallel: bool = False, residual: bool = True, **changes
) -> Example:
    plain = partial(_plain, Plain, {"activation": activation, "scaling": scaling})
    make = partial(_make, name, changes)
    return Example("adapters", make, plain, _stock_parallel if parallel else _stock, _ours, residual)


def _compacter(name: str) -> Example:
    plain = partial(_plain, Plain, {"activation": "gelu", "linear": PlainPHM})
    return Example("adapters", partial(_make, name, {"shared_phm_rule": False}), plain, _stock, _ours)


EXAMPLES = {
    "bottleneck adapter": {
        "seq_bn": _adapter("seq_bn", "relu"),
        "double_seq_bn": _adapter("double_seq_bn", "silu", residual=False),
        "par_bn": _adapter("par_bn", "relu", 4.0, parallel=True),
        "scaled_par_bn": _adapter("scaled_par_bn", "relu", "learned", parallel=True),
        "mam": _adapter("mam", "relu", 4.0, parallel=True),
        "adapterplus": _adapter("adapterplus", "gelu", "channel"),
        "unipelt": _adapter("unipelt", "relu"),
        **{
            f"seq_bn, {theirs}": _adapter("seq_bn", torchs, residual=False, non_linearity=theirs)
            for theirs, torchs in {"gelu": "gelu", "swish": "silu", "tanh": "tanh", "leakyrelu": "leaky_relu"}.items()
        },
        "seq_bn, dropout": _adapter("seq_bn", "relu", dropout=0.3),
    },
    "Compacter": {name: _compacter(name) for name in ("compacter", "compacter++")},
    "invertible": {
        "nice": Example(
            "adapters", _make_coupling, partial(_plain, PlainCoupling, {}), lambda m, h, residual: m(h), _coupling
        )
    },
    "AdapterFusion": {
        name: Example("adapters", partial(_make_fusion, name), _plain_fusion, _stock_fusion, _fusion, True)
        for name in ("dynamic", "static")
    },
}
