"""Triton kernels. Installed as ``peftkern.kernels``; they import torch, triton and each other, nothing else."""
