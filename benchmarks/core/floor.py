"""The floor of a LoRA linear layer: a lower bound to compare measured times with.

Time is modelled as what the frozen base takes (measured in the same run), plus the branch's FLOPs at the rate that
the base reaches, plus the branch's bytes at the measured copy bandwidth (bytes read and written per second).

    floor_ratio = 1 + (branch_flops / (base_flops / base_time) + branch_bytes / bandwidth) / base_time

For M rows, K in, N out, rank R, e bytes per activation and a bytes per adapter element:

    base_flops    forward 2MKN, forward + backward 4MKN (the weight is frozen: there is no third product)
    branch_flops  forward 2MR(K+N), forward + backward 6MR(K+N)
    branch_bytes  forward  e MK (x for u) + a R(K+N)
                  backward e MN (dy for dB and dS in one pass) + e MK (x for dA) + 2 a R(K+N) (adapters and gradients)
    base_bytes    e (MK + KN + MN) for each product

y and dx get their branch term while the base product writes them, and dropout is drawn again from its seed: neither
costs bytes. ``bytes_bound_fraction`` is (base_bytes + branch_bytes) / bandwidth over the measured time: at 1 the
provider runs at copy bandwidth. Data that stays in a cache can push it above 1, and a provider that beats the
vendor's product can go below the floor. Where the frozen linear of the dtype is skipped as hopelessly slow, the
frozen fp32 linear takes its place in the floor.
"""

from __future__ import annotations

from .case import Case, Floor


def lora_floor(case: Case, which: str) -> Floor:
    """FLOPs and bytes of one LoRA linear layer for the pass ``fwd`` or ``fwd_bwd``."""
    M, K, N, R = case.M, case.K, case.N, case.R
    e, a = case.dtype.itemsize, case.adapter_dtype.itemsize
    passes = 1 if which == "fwd" else 2
    branch_bytes = e * M * K + a * R * (K + N)
    if which == "fwd_bwd":
        branch_bytes += e * M * (N + K) + 2 * a * R * (K + N)
    return Floor(
        base_flops=2.0 * passes * M * K * N,
        branch_flops=(2.0 if which == "fwd" else 6.0) * M * R * (K + N),
        base_bytes=float(e * passes * (M * K + K * N + M * N)),
        branch_bytes=float(branch_bytes),
    )


def floor_ratio(floor: Floor, base_seconds: float, bandwidth: float) -> float:
    """Least possible time over the frozen linear's. ``bandwidth`` in bytes per second."""
    rate = floor.base_flops / base_seconds
    return 1.0 + (floor.branch_flops / rate + floor.branch_bytes / bandwidth) / base_seconds


def bytes_bound_fraction(floor: Floor, seconds: float, bandwidth: float) -> float:
    """Share of ``seconds`` that moving the compulsory bytes takes at ``bandwidth``."""
    return (floor.base_bytes + floor.branch_bytes) / bandwidth / seconds
