"""The benchmark of each op: cases, data, providers."""
