"""The activations of a bottleneck and their slopes, of fp32 tiles, by their names in ``peftkern/activations.py``.

Formulas are those that keep their accuracy: tanh is a series near zero, and no slope is a difference from one.
"""

from __future__ import annotations

import triton
import triton.language as tl

LEAK: tl.constexpr = tl.constexpr(0.01)
GELU_SCALE: tl.constexpr = tl.constexpr(0.7978845608028654)  # sqrt(2 / pi)
GELU_CUBE: tl.constexpr = tl.constexpr(0.044715)
_ROOT: tl.constexpr = tl.constexpr(0.7071067811865476)  # sqrt(1 / 2)
_DENSITY: tl.constexpr = tl.constexpr(0.3989422804014327)  # 1 / sqrt(2 pi)


@triton.jit
def _tanh(t):
    size = tl.abs(t)
    e = tl.exp(-2.0 * size)
    large = (1.0 - e) / (1.0 + e)
    s = t * t
    series = -0.05396825396825397 + s * (0.021869488536155203 + s * -0.008863235529902197)
    small = t * (1.0 + s * (-0.3333333333333333 + s * (0.13333333333333333 + s * series)))
    return tl.where(size < 0.25, small, tl.where(t < 0.0, -large, large))


@triton.jit
def _twice_inner(t):
    # (1 + tanh(u)) / 2 is the sigmoid of 2 u. A constant on the left of a tensor is an error in the interpreter.
    return (t + t * t * t * GELU_CUBE) * (2.0 * GELU_SCALE)


@triton.jit
def _sigmoid(t):
    """(sigmoid, its slope)."""
    e = tl.exp(-tl.abs(t))
    low = 1.0 / (1.0 + e)
    return tl.where(t < 0.0, e * low, low), e * low * low


@triton.jit
def activate(t, NAME: tl.constexpr):
    """f(t)."""
    if NAME == "identity":
        z = t
    elif NAME == "relu":
        z = tl.where(t < 0.0, 0.0, t)  # NaN stays
    elif NAME == "leaky_relu":
        z = tl.where(t < 0.0, t * LEAK, t)
    elif NAME == "gelu":
        z = 0.5 * t * (1.0 + tl.erf(t * _ROOT))
    elif NAME == "gelu_tanh":
        z = t * tl.sigmoid(_twice_inner(t))
    elif NAME == "silu":
        z = t * tl.sigmoid(t)
    elif NAME == "tanh":
        z = _tanh(t)
    else:
        tl.static_assert(NAME == "sigmoid")
        z = tl.sigmoid(t)
    return z


@triton.jit
def slope(t, NAME: tl.constexpr):
    """f'(t)."""
    if NAME == "identity":
        d = tl.full(t.shape, 1.0, tl.float32)
    elif NAME == "relu":
        d = tl.where(t > 0.0, 1.0, 0.0)
    elif NAME == "leaky_relu":
        d = tl.where(t > 0.0, 1.0, LEAK)
    elif NAME == "gelu":
        d = 0.5 * (1.0 + tl.erf(t * _ROOT)) + t * _DENSITY * tl.exp(-0.5 * t * t)
    elif NAME == "gelu_tanh":
        s, bell = _sigmoid(_twice_inner(t))
        d = s + t * bell * (1.0 + t * t * (3.0 * GELU_CUBE)) * (2.0 * GELU_SCALE)
    elif NAME == "silu":
        s, bell = _sigmoid(t)
        d = s + t * bell
    elif NAME == "tanh":
        s, bell = _sigmoid(2.0 * t)
        d = 4.0 * bell
    else:
        tl.static_assert(NAME == "sigmoid")
        s, d = _sigmoid(t)
    return d
