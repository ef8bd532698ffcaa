"""lora_linear: a frozen linear layer with a low-rank branch, all scales included.

    y = g_b * ((x * p_b) W^T) + s * g_d * ((d * u) B^T) + bias,        u = (drop(x) * p_d) A^T

    x (M, K)   W weight (N, K)   A lora_A (R, K)   B lora_B (N, R)   bias (N)   s scaling
    d rank_scale (R)   p_b base_in_scale (K)   p_d delta_in_scale (K)   g_b base_out_scale (N)   g_d delta_out_scale (N)

and its gradients, for the output gradient dy and H = dy^T (d * u):

    dv = s (g_d * dy) B         du = d * dv
    dx = ((g_b * dy) W) * p_b + drop'((du A) * p_d)
    dA = du^T (drop(x) * p_d)   dB = s g_d[:, None] * H
    dd = sum_t dv * u           dg_d = s rowdot(B, H)        dp_d = coldot(A, du^T drop(x))
    dg_b = sum_t dy * h         dp_b = sum_t ((g_b * dy) W) * x        dbias = sum_t dy

W is frozen: there is no dW. Three ops: ``lora_linear_fwd``, ``lora_linear_bwd_adapter`` (one pass over dy and one
over x) and ``lora_linear_bwd_input``. This file is the definition; every back end is tested against it.
"""

from __future__ import annotations

import torch

from ..dispatch.registry import define
from ..problem import Problem, device_arch
from .checks import accumulate_dtype, check_fits, check_number, check_tensor
from .dropout_mask import check_p, check_seed, dropout_mask_ref


def _times(t: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    return t if scale is None else t * scale.to(t.dtype)


def _drop(t: torch.Tensor, dropout_p: float, seed: torch.Tensor | None) -> torch.Tensor:
    # where, not a product: a dropped NaN contributes exactly 0.
    if dropout_p == 0.0:
        return t
    keep = dropout_mask_ref(seed, t.shape[0], t.shape[1], dropout_p)
    return torch.where(keep, t * (1.0 / (1.0 - dropout_p)), 0.0)


def _mm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    # BLAS libraries sum narrow products in one long chain, far less accurately than wide ones: not in a definition.
    if min(a.shape[0], b.shape[1]) >= 16 or a.shape[1] <= 64:
        return a @ b
    return torch.stack([p @ q for p, q in zip(a.split(64, dim=1), b.split(64), strict=True)]).sum(0)


def lora_linear_fwd_ref(
    x, weight, lora_A, lora_B, bias, scaling, dropout_p, seed,
    rank_scale, base_in_scale, delta_in_scale, base_out_scale, delta_out_scale, save_base,
):  # fmt: skip
    """(y, u, h): y in x.dtype, u without d and s in fp32, h = (x * p_b) W^T in x.dtype if ``save_base`` else empty."""
    acc = accumulate_dtype(x.dtype)
    xf = x.to(acc)
    h = _mm(_times(xf, base_in_scale), weight.to(acc).t())
    u = _mm(_times(_drop(xf, dropout_p, seed), delta_in_scale), lora_A.to(acc).t())
    delta = _mm(_times(u, rank_scale) * scaling, lora_B.to(acc).t())
    y = _times(h, base_out_scale) + _times(delta, delta_out_scale)
    if bias is not None:
        y = y + bias.to(acc)
    return y.to(x.dtype), u, h.to(x.dtype, copy=True) if save_base else x.new_empty(0)


def lora_linear_bwd_adapter_ref(
    dy, x, u, h, lora_A, lora_B, scaling, dropout_p, seed, rank_scale, delta_in_scale, delta_out_scale,
    need_A, need_B, need_bias, need_rank_scale, need_delta_in, need_base_out, need_delta_out,
):  # fmt: skip
    """(du, dA, dB, dbias, drank_scale, ddelta_in, dbase_out, ddelta_out); empty where not needed, vectors in fp32."""
    acc = accumulate_dtype(dy.dtype)

    def empty():
        return u.new_empty(0)

    dyf = dy.to(acc)
    dv = _mm(_times(dyf, delta_out_scale), lora_B.to(acc)) * scaling
    du = _times(dv, rank_scale)
    dA, ddelta_in, dB, ddelta_out = lora_A.new_empty(0), empty(), lora_B.new_empty(0), empty()
    if need_A or need_delta_in:
        G = _mm(du.t(), _drop(x.to(acc), dropout_p, seed))
        if need_A:
            dA = _times(G, delta_in_scale).to(lora_A.dtype)
        if need_delta_in:
            ddelta_in = (lora_A.to(acc) * G).sum(0)
    if need_B or need_delta_out:
        H = _mm(dyf.t(), _times(u, rank_scale)) * scaling
        if need_B:
            dB = _times(H.t(), delta_out_scale).t().to(lora_B.dtype).contiguous()
        if need_delta_out:
            ddelta_out = (lora_B.to(acc) * H).sum(1)
    dbias = dyf.sum(0) if need_bias else empty()
    drank_scale = (dv * u).sum(0) if need_rank_scale else empty()
    dbase_out = (dyf * h.to(acc)).sum(0) if need_base_out else empty()
    return du.clone() if du is dv else du, dA, dB, dbias, drank_scale, ddelta_in, dbase_out, ddelta_out


def lora_linear_bwd_input_ref(
    dy, du, x, weight, lora_A, dropout_p, seed, base_in_scale, delta_in_scale, base_out_scale, need_base_in
):
    """(dx in dy.dtype, dbase_in in fp32 or empty)."""
    acc = accumulate_dtype(dy.dtype)
    base = _mm(_times(dy.to(acc), base_out_scale), weight.to(acc))
    delta = _drop(_times(_mm(du, lora_A.to(acc)), delta_in_scale), dropout_p, seed)
    dbase_in = (base * x.to(acc)).sum(0) if need_base_in else du.new_empty(0)
    return (_times(base, base_in_scale) + delta).to(dy.dtype), dbase_in


def _adapter_dtypes(dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    return (dtype, torch.float32)


def _check_vectors(dtypes, device: torch.device, N: int, K: int, R: int, **vectors) -> None:
    sizes = {"rank_scale": ("(R,)", R), "base_in_scale": ("(K,)", K), "delta_in_scale": ("(K,)", K)}
    for name, vector in vectors.items():
        if vector is not None:
            meaning, size = sizes.get(name, ("(N,)", N))
            check_fits(name, vector, (size,), meaning, device, dtypes)


def _check_adapters(lora_A, lora_B, dtypes, device: torch.device, N: int | None, K: int) -> tuple[int, int]:
    for name, value, shape in (("lora_A", lora_A, "(R, K)"), ("lora_B", lora_B, "(N, R)")):
        check_tensor(name, value)
        if value.dim() != 2:
            raise ValueError(f"{name} has shape {tuple(value.shape)}, expected {shape}")
    N, R = lora_B.shape[0] if N is None else N, lora_A.shape[0]
    check_fits("lora_A", lora_A, (R, K), "(R, K)", device, dtypes)
    check_fits("lora_B", lora_B, (N, R), "(N, R)", device, dtypes)
    if lora_B.dtype != lora_A.dtype:
        raise TypeError(f"lora_B has dtype {lora_B.dtype}, expected {lora_A.dtype} like lora_A")
    return N, R


def _check_dropout(dropout_p, seed, device: torch.device) -> None:
    check_p(dropout_p)
    if dropout_p > 0.0:
        check_seed(seed, device)


def check_base(x, weight) -> tuple[int, int]:
    """(N, K) if x (..., K) and weight (N, K) are floating point tensors that fit, else TypeError or ValueError."""
    check_tensor("x", x)
    if x.dim() < 1:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (..., K)")
    check_tensor("weight", weight)
    if weight.dim() != 2:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, expected (N, K)")
    N, K = weight.shape
    if x.shape[-1] != K:
        raise ValueError(
            f"x has shape {tuple(x.shape)}, expected (..., K) with K = {K} as weight has {tuple(weight.shape)}"
        )
    return N, K


def _check_rows(name: str, value, columns: int, letter: str) -> int:
    check_tensor(name, value)
    if value.dim() != 2 or value.shape[1] != columns:
        raise ValueError(f"{name} has shape {tuple(value.shape)}, expected (M, {letter}) with {letter} = {columns}")
    return value.shape[0]


def _problem(op: str, like: torch.Tensor, adapter: torch.Tensor, M, N, K, R, **present) -> Problem:
    device = like.device
    flags = frozenset(name for name, value in present.items() if value is not None and value is not False)
    arch = device_arch(device.type, device.index)
    return Problem(op, device.type, arch, like.dtype, adapter.dtype, M, N, K, R, flags)


def _describe_fwd(
    x, weight, lora_A, lora_B, bias, scaling, dropout_p, seed,
    rank_scale, base_in_scale, delta_in_scale, base_out_scale, delta_out_scale, save_base,
) -> Problem:  # fmt: skip
    vectors = dict(
        rank_scale=rank_scale, base_in_scale=base_in_scale, delta_in_scale=delta_in_scale,
        base_out_scale=base_out_scale, delta_out_scale=delta_out_scale,
    )  # fmt: skip
    N, K = check_base(x, weight)
    dtypes = _adapter_dtypes(x.dtype)
    check_fits("weight", weight, (N, K), "(N, K)", x.device, (x.dtype,))
    _, R = _check_adapters(lora_A, lora_B, dtypes, x.device, N, K)
    if bias is not None:
        check_fits("bias", bias, (N,), "(N,)", x.device, dtypes)
    _check_vectors(dtypes, x.device, N, K, R, **vectors)
    check_number("scaling", scaling)
    _check_dropout(dropout_p, seed, x.device)
    M = _check_rows("x", x, K, "K")
    present = dict(vectors, bias=bias, dropout=dropout_p > 0.0, save_base=save_base)
    return _problem("lora_linear_fwd", x, lora_A, M, N, K, R, **present)


def _describe_bwd_adapter(
    dy, x, u, h, lora_A, lora_B, scaling, dropout_p, seed, rank_scale, delta_in_scale, delta_out_scale,
    need_A, need_B, need_bias, need_rank_scale, need_delta_in, need_base_out, need_delta_out,
) -> Problem:  # fmt: skip
    check_tensor("dy", dy)
    K = lora_A.shape[-1] if isinstance(lora_A, torch.Tensor) and lora_A.dim() == 2 else 0
    N, R = _check_adapters(lora_A, lora_B, _adapter_dtypes(dy.dtype), dy.device, None, K)
    M = _check_rows("dy", dy, N, "N")
    check_fits("u", u, (M, R), "(M, R)", dy.device, (accumulate_dtype(dy.dtype),))
    if need_A or need_delta_in:
        check_fits("x", x, (M, K), "(M, K)", dy.device, (dy.dtype,))
    if need_base_out:
        check_fits("h", h, (M, N), "(M, N)", dy.device, (dy.dtype,))
    vectors = dict(rank_scale=rank_scale, delta_in_scale=delta_in_scale, delta_out_scale=delta_out_scale)
    _check_vectors(_adapter_dtypes(dy.dtype), dy.device, N, K, R, **vectors)
    check_number("scaling", scaling)
    _check_dropout(dropout_p, seed, dy.device)
    needs = dict(need_A=need_A, need_B=need_B, need_bias=need_bias, need_rank_scale=need_rank_scale)
    needs |= dict(need_delta_in=need_delta_in, need_base_out=need_base_out, need_delta_out=need_delta_out)
    return _problem("lora_linear_bwd_adapter", dy, lora_A, M, N, K, R, **vectors, **needs, dropout=dropout_p > 0.0)


def _describe_bwd_input(
    dy, du, x, weight, lora_A, dropout_p, seed, base_in_scale, delta_in_scale, base_out_scale, need_base_in
) -> Problem:
    check_tensor("dy", dy)
    check_tensor("weight", weight, dtypes=(dy.dtype,))
    check_tensor("lora_A", lora_A, dtypes=_adapter_dtypes(dy.dtype))
    if weight.dim() != 2:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, expected (N, K)")
    N, K = weight.shape
    M = _check_rows("dy", dy, N, "N")
    R = _check_rows("lora_A", lora_A, K, "K")
    check_fits("weight", weight, (N, K), "(N, K)", dy.device, (dy.dtype,))
    check_fits("lora_A", lora_A, (R, K), "(R, K)", dy.device, _adapter_dtypes(dy.dtype))
    check_fits("du", du, (M, R), "(M, R)", dy.device, (accumulate_dtype(dy.dtype),))
    if need_base_in:
        check_fits("x", x, (M, K), "(M, K)", dy.device, (dy.dtype,))
    vectors = dict(base_in_scale=base_in_scale, delta_in_scale=delta_in_scale, base_out_scale=base_out_scale)
    _check_vectors(_adapter_dtypes(dy.dtype), dy.device, N, K, R, **vectors)
    _check_dropout(dropout_p, seed, dy.device)
    present = dict(vectors, need_base_in=need_base_in, dropout=dropout_p > 0.0)
    return _problem("lora_linear_bwd_input", dy, lora_A, M, N, K, R, **present)


def _fake_fwd(*args):
    _describe_fwd(*args)
    x, weight, lora_A, save_base = args[0], args[1], args[2], args[-1]
    M, N = x.shape[0], weight.shape[0]
    u = x.new_empty((M, lora_A.shape[0]), dtype=accumulate_dtype(x.dtype))
    return x.new_empty((M, N)), u, x.new_empty((M, N) if save_base else 0)


def _fake_bwd_adapter(*args):
    _describe_bwd_adapter(*args)
    dy, u, lora_A, lora_B = args[0], args[2], args[4], args[5]
    need_A, need_B, need_bias, need_rank_scale, need_delta_in, need_base_out, need_delta_out = args[-7:]
    N, (R, K) = dy.shape[1], lora_A.shape

    def vector(need: bool, size: int) -> torch.Tensor:
        return u.new_empty(size if need else 0)

    return (
        u.new_empty(u.shape),
        lora_A.new_empty(lora_A.shape if need_A else 0),
        lora_B.new_empty(lora_B.shape if need_B else 0),
        vector(need_bias, N),
        vector(need_rank_scale, R),
        vector(need_delta_in, K),
        vector(need_base_out, N),
        vector(need_delta_out, N),
    )


def _fake_bwd_input(*args):
    _describe_bwd_input(*args)
    dy, du, weight, need_base_in = args[0], args[1], args[3], args[-1]
    K = weight.shape[1]
    return dy.new_empty((dy.shape[0], K)), du.new_empty(K if need_base_in else 0)


def _flops_fwd(p: Problem, *args) -> int:
    return 2 * p.M * (p.N * p.K + p.R * (p.K + p.N))


def _flops_bwd_adapter(p: Problem, *args) -> int:
    products = p.N  # dv
    products += p.K if p.flags & {"need_A", "need_delta_in"} else 0
    products += p.N if p.flags & {"need_B", "need_delta_out"} else 0
    return 2 * p.M * p.R * products


def _flops_bwd_input(p: Problem, *args) -> int:
    return 2 * p.M * p.K * (p.N + p.R)


define(
    "lora_linear_fwd",
    "(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor? bias, float scaling, float dropout_p,"
    " Tensor? seed, Tensor? rank_scale, Tensor? base_in_scale, Tensor? delta_in_scale, Tensor? base_out_scale,"
    " Tensor? delta_out_scale, bool save_base) -> (Tensor, Tensor, Tensor)",
    reference=lora_linear_fwd_ref,
    fake=_fake_fwd,
    describe=_describe_fwd,
    flops=_flops_fwd,
)
define(
    "lora_linear_bwd_adapter",
    "(Tensor dy, Tensor? x, Tensor u, Tensor? h, Tensor lora_A, Tensor lora_B, float scaling, float dropout_p,"
    " Tensor? seed, Tensor? rank_scale, Tensor? delta_in_scale, Tensor? delta_out_scale, bool need_A, bool need_B,"
    " bool need_bias, bool need_rank_scale, bool need_delta_in, bool need_base_out, bool need_delta_out)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=lora_linear_bwd_adapter_ref,
    fake=_fake_bwd_adapter,
    describe=_describe_bwd_adapter,
    flops=_flops_bwd_adapter,
)
define(
    "lora_linear_bwd_input",
    "(Tensor dy, Tensor du, Tensor? x, Tensor weight, Tensor lora_A, float dropout_p, Tensor? seed,"
    " Tensor? base_in_scale, Tensor? delta_in_scale, Tensor? base_out_scale, bool need_base_in) -> (Tensor, Tensor)",
    reference=lora_linear_bwd_input_ref,
    fake=_fake_bwd_input,
    describe=_describe_bwd_input,
    flops=_flops_bwd_input,
)
