"""block_rotate and its gradient on Triton: the ops' arguments as launches, on the device and stream of the call."""

from __future__ import annotations

from .device import kernel_settings, on_device


def block_rotate_fwd(c, way):
    """y (M, K), see ``peftkern.ops.block_rotate``."""
    from ...kernels.block_rotate import block_rotate

    with on_device(c.x):
        return block_rotate(c.x, c.R, c.index, kernel_settings(c.x, way))


def block_rotate_bwd(c, way):
    """fp32 (K / b, b, b), likewise."""
    from ...kernels.block_rotate import block_rotate_grad

    with on_device(c.x):
        return block_rotate_grad(c.x, c.dy, c.size, c.index, kernel_settings(c.x, way))


OPS = {"block_rotate_fwd": block_rotate_fwd, "block_rotate_bwd": block_rotate_bwd}
