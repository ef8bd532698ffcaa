"""Differentiable products with a layer's weight alone: without a branch, of a dropped input, of a weight that is made anew."""
