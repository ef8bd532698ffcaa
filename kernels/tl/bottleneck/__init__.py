"""The kernels of bottleneck_adapter."""
