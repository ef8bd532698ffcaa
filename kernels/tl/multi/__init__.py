"""Kernels of multi_lora_linear and sgmv: many adapters in one batch, found through a table of addresses."""
