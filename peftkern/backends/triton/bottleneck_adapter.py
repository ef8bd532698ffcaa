"""bottleneck_adapter and its gradients on Triton: the ops' arguments as launches, on the device and stream of the call."""

from __future__ import annotations

from .device import kernel_settings, on_device

# Up to ``scaling`` an op's arguments are those of the kernels.


def _dropouts(c):
    from ...kernels.call import Dropout

    drop = Dropout(c.dropout_p, c.seed)
    return (drop, Dropout()) if c.on_input else (Dropout(), drop)


def bottleneck_adapter_fwd(c, way):
    """(y, t), see ``peftkern.ops.bottleneck_adapter``."""
    from ...kernels.bottleneck.bottleneck_adapter import Forward, forward

    given = Forward(*c[:10], *_dropouts(c))
    with on_device(c.h):
        return forward(given, kernel_settings(c.h, way))


def bottleneck_adapter_bwd(c, way):
    """(dh, ddown, dup, ddown_bias, dup_bias, dgate, dout_scale), likewise."""
    from ...kernels.bottleneck.bottleneck_adapter import Backward, Needs, backward

    given = Backward(*c[:10], *_dropouts(c), c.through, Needs(*c.needs))
    with on_device(c.dy):
        return backward(given, kernel_settings(c.dy, way))


OPS = {"bottleneck_adapter_fwd": bottleneck_adapter_fwd, "bottleneck_adapter_bwd": bottleneck_adapter_bwd}
