"""The Triton launches of each op, and what must hold of their code."""
