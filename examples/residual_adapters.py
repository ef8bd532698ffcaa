"""Adapters in the residual stream of a BERT, put there by hand: by their library's own modules, and the same by peftkern.

The library is AdapterHub's ``adapters`` where it is installed; elsewhere the same formulas in torch's own layers stand for it.
Each function gives two equal models, of which the second holds peftkern's modules with copies of the first one's values.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from peftkern import BottleneckAdapter, ReFT, bottleneck_adapter, reft_positions
from peftkern.nn.compositions import phm_weight

try:
    import adapters
    from adapters.methods import modeling
    from adapters.methods.reft import ReftUnit
except ModuleNotFoundError:
    adapters = None

LIBRARY = "plain torch" if adapters is None else f"adapters {adapters.__version__}"
WIDTH, RANK, PHM_DIM, POSITIONS = 48, 8, 4, "f3+l2"

Models = tuple[nn.Module, nn.Module]


def bottleneck(model: Callable[[], nn.Module]) -> Models:
    """Houlsby's two adapters a layer, behind the projections of the attention and of the feed-forward part."""
    stock, fused = model(), model()
    theirs = [_stock_adapter(stock.config.hidden_size, phm=False) for _ in _projections(stock)]
    return _behind(stock, [_Stock(a) for a in theirs]), _behind(fused, [_bottleneck(a) for a in theirs])


def compacter(model: Callable[[], nn.Module]) -> Models:
    """At the same places, matrices that are sums of Kronecker products, one factor of which all of them share."""
    stock, fused = model(), model()
    theirs = [_stock_adapter(stock.config.hidden_size, phm=True) for _ in _projections(stock)]
    rule = theirs[0].adapter_up.phm_rule
    for layer in (layer for a in theirs for layer in (a.adapter_down[0], a.adapter_up)):
        layer.set_phm_rule(rule)
    own = _copy(rule)
    return _behind(stock, [_Stock(a) for a in theirs]), _behind(fused, [Compacter(own, a) for a in theirs])


def loreft(model: Callable[[], nn.Module]) -> Models:
    """LoReFT behind each layer, at the first three and the last two tokens of a sequence."""
    stock, fused = model(), model()
    theirs = [_stock_reft(stock.config.hidden_size) for _ in stock.encoder.layer]
    return _edited(stock, [_Gathered(unit) for unit in theirs]), _edited(fused, [_loreft(unit) for unit in theirs])


def _copy(t: Tensor) -> nn.Parameter:
    return nn.Parameter(t.detach().clone())


def _bottleneck(theirs: nn.Module) -> BottleneckAdapter:
    down, up = theirs.adapter_down[0], theirs.adapter_up
    ours = BottleneckAdapter(down.in_features, down.out_features, "gelu")
    ours.load_state_dict({"down": down.weight, "down_bias": down.bias, "up": up.weight, "up_bias": up.bias})
    return ours


class Compacter(nn.Module):
    """A bottleneck adapter whose matrices are made of ``rule`` (n, n, n) and factors W of rank one."""

    def __init__(self, rule: nn.Parameter, theirs: nn.Module) -> None:
        super().__init__()
        self.rule = rule
        for name, layer in (("down", theirs.adapter_down[0]), ("up", theirs.adapter_up)):
            for part, value in (("left", layer.W_left), ("right", layer.W_right), ("bias", layer.b)):
                setattr(self, f"{name}_{part}", _copy(value))

    def forward(self, h: Tensor) -> Tensor:
        """(..., H) -> (..., H)."""
        down = phm_weight(self.rule, (self.down_left, self.down_right))
        up = phm_weight(self.rule, (self.up_left, self.up_right))
        return bottleneck_adapter(h, down, up, down_bias=self.down_bias, up_bias=self.up_bias, activation="gelu")


@torch.no_grad()
def _loreft(theirs: nn.Module) -> ReFT:
    source = theirs.learned_source
    ours = ReFT(source.in_features, source.out_features)
    ours.set_rotation(theirs.projection.weight)
    ours.weight.copy_(source.weight)
    ours.bias.copy_(source.bias)
    return ours


# Where they stand in the model.


def _projections(model: nn.Module) -> list[nn.Module]:
    # What holds a ``dense`` whose output is added to the residual stream.
    return [part for layer in model.encoder.layer for part in (layer.attention.output, layer.output)]


def _behind(model: nn.Module, modules: list[nn.Module]) -> nn.Module:
    for part, module in zip(_projections(model), modules, strict=True):
        part.dense = nn.Sequential(part.dense, module)
    return model


def _edited(model: nn.Module, units: list[nn.Module]) -> nn.Module:
    # A layer ends with a norm.
    edits = [_Edit(unit) for unit in units]
    for layer, edit in zip(model.encoder.layer, edits, strict=True):
        layer.output.LayerNorm = nn.Sequential(layer.output.LayerNorm, edit)

    def look(module: nn.Module, args: tuple, kwargs: dict) -> None:
        positions = reft_positions(POSITIONS, kwargs["attention_mask"].sum(1), overlap="last")
        if (positions < 0).any():  # the stock side could not leave them out
            raise ValueError(f"a sequence has fewer tokens than {POSITIONS} edits")
        for edit in edits:
            edit.positions = positions

    model.register_forward_pre_hook(look, with_kwargs=True)
    return model


class _Edit(nn.Module):
    # ReFT where the model tells it to be.
    def __init__(self, unit: nn.Module) -> None:
        super().__init__()
        self.unit, self.positions = unit, None

    def forward(self, h: Tensor) -> Tensor:
        return self.unit(h, self.positions)


# The library's modules, and what stands for them.


class _Stock(nn.Module):
    # An adapter of the library, whose residual is its input.
    def __init__(self, adapter: nn.Module) -> None:
        super().__init__()
        self.adapter = adapter

    def forward(self, h: Tensor) -> Tensor:
        return self.adapter(h, h)[0]


class _Gathered(nn.Module):
    # A unit of the library on the listed rows, gathered and scattered as its ReftModule does.
    def __init__(self, unit: nn.Module) -> None:
        super().__init__()
        self.unit = unit

    def forward(self, h: Tensor, positions: Tensor) -> Tensor:
        rows = positions.unsqueeze(-1).expand(-1, -1, h.shape[-1])
        return h.scatter(1, rows, self.unit(h.gather(1, rows)))


def _stock_adapter(hidden: int, phm: bool) -> nn.Module:
    if adapters is None:
        return _PlainAdapter(hidden, phm)
    config = adapters.DoubleSeqBnConfig(non_linearity="gelu", phm_layer=phm, phm_dim=PHM_DIM, shared_phm_rule=False)
    return modeling.Adapter("adapter", hidden, WIDTH, config)


def _stock_reft(hidden: int) -> nn.Module:
    return _PlainReft(hidden) if adapters is None else ReftUnit(hidden, RANK, orthogonal=True)


class _PlainAdapter(nn.Module):
    # ``modeling.Adapter`` in torch's layers, started like it.
    def __init__(self, hidden: int, phm: bool) -> None:
        super().__init__()
        down, up = ((_PlainPHM if phm else nn.Linear)(*sizes) for sizes in ((hidden, WIDTH), (WIDTH, hidden)))
        for layer in () if phm else (down, up):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        self.adapter_down, self.adapter_up = nn.Sequential(down, nn.GELU()), up

    def forward(self, h: Tensor, residual: Tensor) -> tuple[Tensor]:
        return (residual + self.adapter_up(self.adapter_down(h)),)


class _PlainPHM(nn.Module):
    # ``modeling.PHMLayer`` with a full rule and factors of rank one.
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        n = PHM_DIM
        self.phm_rule = nn.Parameter(torch.randn(n, n, n) * 0.01)
        self.W_left, self.W_right = (nn.Parameter(torch.empty(n, *s)) for s in ((inputs // n, 1), (1, outputs // n)))
        for factor in (*self.W_left, *self.W_right):
            nn.init.xavier_normal_(factor.data)
        self.b = nn.Parameter(torch.zeros(outputs))

    def set_phm_rule(self, rule: nn.Parameter) -> None:
        self.phm_rule = rule

    def forward(self, h: Tensor) -> Tensor:
        parts = [torch.kron(rule, W) for rule, W in zip(self.phm_rule, torch.bmm(self.W_left, self.W_right))]
        return h @ sum(parts) + self.b


class _PlainReft(nn.Module):
    # ``ReftUnit``.
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.learned_source = nn.Linear(hidden, RANK)
        self.projection = nn.utils.parametrizations.orthogonal(nn.Linear(hidden, RANK, bias=False))

    def forward(self, h: Tensor) -> Tensor:
        return h + (self.learned_source(h) - self.projection(h)) @ self.projection.weight
