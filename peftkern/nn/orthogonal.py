"""A matrix of orthonormal rows, made of free numbers: the Householder map of torch's orthogonal parametrisation.

    X (k, n), k <= n     V = X above its diagonal, with 1 on it     Q = [I 0] H_1 ... H_k,  H_i = I - 2 v_i^T v_i / |v_i|^2
    Q = [I 0] - C^T V    S C = V_k,   S = the upper triangle of V V^T with half its diagonal,   V_k = the first k columns of V

times the sign of X's diagonal, row by row. The second line takes all reflections at once, in two products of n k k and a
triangular system of k unknowns, where ``torch.linalg.householder_product`` takes one after the other and its gradient
makes matrices (n, n).
"""

from __future__ import annotations

import torch
from torch import Tensor


def orthonormal(X: Tensor, base: Tensor | None = None) -> Tensor:
    """What ``torch.nn.utils.parametrizations.orthogonal`` makes of its ``original`` by its Householder map.

    Args:
        X: (k, n) with k <= n, or (n, k), in fp32 or fp64. Its diagonal is signs, whose gradient is zero. torch rounds them
            to integers, so that the matrix is zero once weight decay has made them smaller; here a sign stays one.
        base: (n, n), torch's ``base`` where it has one (``use_trivialization``): Q base^T is returned.

    Returns orthonormal rows (k, n), or columns (n, k). Differentiable in X.
    """
    wide = X if X.shape[0] <= X.shape[1] else X.mT
    k, n = wide.shape
    V = wide.triu(1) + torch.eye(k, n, dtype=X.dtype, device=X.device)
    G = V @ V.mT
    S = G.triu(1) + torch.diag_embed(0.5 * G.diagonal())
    C = torch.linalg.solve_triangular(S, V[:, :k], upper=True)
    first = torch.eye(k, n, dtype=X.dtype, device=X.device) if base is None else base[:, :k].mT
    Q = first - C.mT @ (V if base is None else V @ base.mT)
    signs = 1.0 - 2.0 * (wide.detach().diagonal() < 0).to(X.dtype)
    Q = Q * signs[:, None]
    return Q if wide is X else Q.mT


def free_numbers(Q: Tensor) -> Tensor:
    """X of which ``orthonormal`` makes Q (k, n), k <= n; of other rows it makes those that Gram and Schmidt would."""
    A, tau = torch.geqrf(Q.mT)
    signs = A.diagonal().sign()
    A.diagonal().copy_(torch.where(tau == 0, -signs, signs))
    return A.mT.contiguous()
