"""The two matrices of a bottleneck in AdapterHub's modules: those of ``nn.Linear``, or made of Compacter's factors."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

from adapters.context import ForwardContext
from adapters.methods.modeling import Activation_Function_Class, PHMLayer
from torch import Tensor, nn
from transformers import activations as theirs

from ...activations import LEAK
from ...methods.look import Look, NotCovered
from ...nn.compositions import phm_weight

# The modules that the library makes of a ``non_linearity``, and what their attributes have to be.
_ACTIVATIONS: dict[type, tuple[str, dict]] = {
    nn.Identity: ("identity", {}),
    nn.ReLU: ("relu", {}),
    nn.Tanh: ("tanh", {}),
    nn.Sigmoid: ("sigmoid", {}),
    nn.SiLU: ("silu", {}),
    nn.LeakyReLU: ("leaky_relu", {"negative_slope": LEAK}),
    theirs.GELUActivation: ("gelu", {"act": nn.functional.gelu}),
    theirs.NewGELUActivation: ("gelu_tanh", {}),
    theirs.LinearActivation: ("identity", {}),
    theirs.SiLUActivation: ("silu", {}),
}


class Projection(NamedTuple):
    """y = x weight^T + bias. ``layer``: whose weight it is. ``like``: a parameter of its dtype and device."""

    layer: nn.Module
    bias: Tensor | None
    like: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.layer.out_features, self.layer.in_features

    def weight(self) -> Tensor:
        """(N, K), of a PHMLayer made anew."""
        return self.like if type(self.layer) is nn.Linear else _phm(self.layer)


def projection(look: Look | None, name: str) -> Projection:
    """What a part of a module is. Raises NotCovered unless calling it would be the product and nothing else."""
    if look is None:
        raise NotCovered(f"{name} is missing")
    if type(look.module) is not PHMLayer:
        look.require(nn.Linear, name)
        return Projection(look.module, look.tensor("bias"), look.tensor("weight"))
    look.require(PHMLayer, name)
    bias = look.tensor("b")
    if bias is None:
        raise NotCovered(f"{name} has no bias")
    return Projection(look.module, bias, bias)


def _phm(layer: PHMLayer) -> Tensor:
    def factor(shared: bool, factorised: bool, name: str, shared_name: str):
        if shared:  # by all modules of the adapter, in the model's own context
            name, of = shared_name, ForwardContext.get_context().shared_parameters[layer.name].__getitem__
        else:
            of = partial(getattr, layer)
        return (of(f"{name}_left"), of(f"{name}_right")) if factorised else of(name)

    rule = factor(layer.shared_phm_rule, layer.factorized_phm_rule, "phm_rule", "phm_rule")
    return phm_weight(rule, factor(layer.shared_W_phm, layer.factorized_phm_W, "W", f"W_{layer.position}"))


def activation(look: Look, name: str) -> str:
    """Name of the activation that an ``Activation_Function_Class`` applies."""
    look.require(Activation_Function_Class, name)
    inner = look.part("f")
    if inner is None:  # a function
        if look.value("f") is nn.functional.leaky_relu:
            return "leaky_relu"
        raise NotCovered(f"its activation {look.module.f!r} is not covered")
    cls = type(inner.module)
    known, attributes = _ACTIVATIONS.get(cls, ("", {}))
    if not known or any(inner.value(key) != value for key, value in attributes.items()):
        raise NotCovered(f"its activation {cls.__name__} is not covered")
    inner.require(cls, "its activation")
    return known
