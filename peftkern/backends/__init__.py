"""Back ends: tensors to launchers. Each module says why it is unavailable or declines a Problem, and lists its OPS."""
