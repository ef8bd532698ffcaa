"""Weights in codes of 4 or 8 bits, as the kernels read them."""
