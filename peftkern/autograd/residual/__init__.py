"""Adapters in the residual stream: what is added to h is made of h alone."""
