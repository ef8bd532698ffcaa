"""Whether a peer computes the op at all: a comparison of different things is worthless.

Without dropout its output and gradients are held against fp64. Dropout masks differ from peer to peer, but:

- The branch alone (W = 0) is linear in x, in lora_A and in lora_B, whatever the mask. So the inner product of each with
  its gradient for dy = y is that of y with itself; a backward pass that forgets the mask, or draws another, breaks that.
- The branch differs from the one without dropout by noise of a known size.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..core.case import Step

# Largest relative error (Frobenius norms). Peers round adapters, masked inputs and products to the activation's dtype.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
# What the size of the noise may be off by: it is that of a few thousand coins.
NOISE = (0.6, 1.6)


def wrong(step: Step, exact: Sequence[Tensor], bounds: Mapping[str, tuple[float, float]] | None = None) -> str | None:
    """What is wrong with a step without dropout, or None. ``exact``: y, then a gradient for each of its leaves (none are
    looked at if it has no graph). ``bounds``: by "y", "dx", "dA" or "dB", the least and the largest relative error of
    what is not held to the dtype's tolerance."""
    y = step.forward(0)
    grads = torch.autograd.grad(y, step.leaves[0], step.dy[0]) if y.requires_grad else ()
    tolerance = TOLERANCE[y.dtype]
    names = itertools.chain(("y", "dx", "dA", "dB"), (f"gradient {k}" for k in itertools.count(4)))
    for name, mine, right in zip(names, (y.detach(), *grads), exact):
        error = ((mine.double() - right).norm() / right.norm().clamp_min(1e-30)).item()
        least, most = (bounds or {}).get(name, (0.0, tolerance))
        if not least <= error <= most:
            limits = f"at most {most:.0e}" if not least else f"from {least:.1e} to {most:.1e}"
            return f"computes something else ({name}: relative error {error:.1e}, {limits})"
    return None


def wrong_dropout(step: Step, plain: Tensor, variance: float) -> str | None:
    """What is wrong with the dropout of a step whose W is 0, or None. ``plain``: its y without dropout, in fp64;
    ``variance``: the expected sum of squares of what dropout adds to it."""
    y = step.forward(0)
    leaves = step.leaves[0]
    grads = torch.autograd.grad(y, leaves, y.detach())
    y = y.detach().double()
    tolerance = TOLERANCE[step.dy[0].dtype]
    size = y.square().sum().item()
    for name, leaf, grad in zip(("x", "lora_A", "lora_B"), leaves, grads):
        product = (leaf.detach().double() * grad.double()).sum().item()
        if not abs(product / size - 1) <= tolerance:
            return f"the gradient of {name} belongs to another output ({product / size:.3f} of its inner product)"
    noise = (y - plain).square().sum().item() / variance
    if not NOISE[0] <= noise <= NOISE[1]:
        return f"dropout has another probability (its noise has {noise:.2f} times the expected power)"
    return None
