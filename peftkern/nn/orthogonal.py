"""A matrix of orthonormal rows, made of free numbers: the Householder map of torch's orthogonal parametrisation.

    X (k, n), k <= n     V = X above its diagonal, with 1 on it     Q = [I 0] H_1 ... H_k,  H_i = I - 2 v_i^T v_i / |v_i|^2
    Q = [I 0] - C^T V    S C = V_k,   S = the upper triangle of V V^T with half its diagonal,   V_k = the first k columns of V

times the sign of X's diagonal, row by row. The second line takes all reflections at once, in two products of n k k and a
triangular system of k unknowns, where ``torch.linalg.householder_product`` takes one after the other and its gradient
makes matrices (n, n).
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from ..autograd.shapes import uncast


def orthonormal(X: Tensor, base: Tensor | None = None, signs: Tensor | None = None) -> Tensor:
    """What ``torch.nn.utils.parametrizations.orthogonal`` makes of its ``original`` by its Householder map.

    Args:
        X: (k, n) with k <= n, or (n, k), in fp32 or fp64. Its diagonal is signs, whose gradient is zero. torch rounds them
            to integers, so that the matrix is zero once weight decay has made them smaller; here a sign stays one.
        base: (n, n), torch's ``base`` where it has one (``use_trivialization``): Q base^T is returned.
        signs: (k), what takes the place of the diagonal's signs.

    Returns orthonormal rows (k, n), or columns (n, k), in X's dtype under autocast too. Differentiable in X.
    """
    with uncast(X):
        return _orthonormal(X, base, signs)


def _orthonormal(X: Tensor, base: Tensor | None, signs: Tensor | None) -> Tensor:
    wide = X if X.shape[0] <= X.shape[1] else X.mT
    k, n = wide.shape
    V = wide.triu(1) + torch.eye(k, n, dtype=X.dtype, device=X.device)
    G = V @ V.mT
    S = G.triu(1) + torch.diag_embed(0.5 * G.diagonal())
    C = torch.linalg.solve_triangular(S, V[:, :k], upper=True)
    first = torch.eye(k, n, dtype=X.dtype, device=X.device) if base is None else base[:, :k].mT
    Q = first - C.mT @ (V if base is None else V @ base.mT)
    if signs is None:
        signs = 1.0 - 2.0 * (wide.detach().diagonal() < 0).to(X.dtype)
    Q = Q * signs[:, None]
    return Q if wide is X else Q.mT


def free_numbers(Q: Tensor) -> Tensor:
    """X of which ``orthonormal`` makes Q (k, n), k <= n; of other rows it makes those that Gram and Schmidt would."""
    A, tau = torch.geqrf(Q.mT)
    signs = A.diagonal().sign()
    A.diagonal().copy_(torch.where(tau == 0, -signs, signs))
    return A.mT.contiguous()


class Rotation:
    """``orthonormal`` of numbers that may train: made at each call while they do, otherwise kept until they differ.

    Kept on the CPU alone: elsewhere a look at the numbers would make the host wait.
    """

    def __init__(self) -> None:
        # The numbers, the base with its version, and what was made of them.
        self._made: tuple[Tensor, Tensor | None, int, Tensor] | None = None

    def of(self, X: Tensor, base: Tensor | None = None, *, whole_signs: bool = False) -> Tensor:
        """Arguments as of ``orthonormal``. ``whole_signs``: those of X's diagonal are rounded to integers, as torch does."""
        trains = (X.requires_grad and torch.is_grad_enabled()) or torch.compiler.is_compiling()
        if trains or not X.is_cpu or (base is not None and base.is_inference()):
            return _signed(X, base, whole_signs)
        version, made = 0 if base is None else base._version, self._made
        if made is None or made[1] is not base or made[2] != version or not _equal(made[0], X):
            with torch.inference_mode(False), torch.no_grad():
                made = self._made = X.detach().clone(), base, version, _signed(X, base, whole_signs)
        return made[3]


def _signed(X: Tensor, base: Tensor | None, whole: bool) -> Tensor:
    return orthonormal(X, base, X.detach().diagonal().int() if whole else None)


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


_rotations: weakref.WeakKeyDictionary[nn.Module, Rotation] = weakref.WeakKeyDictionary()


def parametrised(module: nn.Module) -> Tensor:
    """``module.weight``, made by ``Rotation`` if it is under ``torch.nn.utils.parametrizations.orthogonal`` with the
    Householder map and nothing else."""
    if not parametrize.is_parametrized(module, "weight"):
        return module.weight
    steps = module.parametrizations["weight"]
    X, step = steps.original, steps[0]
    if (
        len(steps) > 1
        or type(step) is not parametrizations._Orthogonal
        or step.orthogonal_map is not parametrizations._OrthMaps.householder
        or X.dim() != 2
        or X.dtype not in (torch.float32, torch.float64)
    ):
        return module.weight
    return _rotations.setdefault(module, Rotation()).of(X, getattr(step, "base", None), whole_signs=True)
