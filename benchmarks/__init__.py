"""Benchmarks of every op: registry, runner, verifier and report. Installed as ``peftkern.benchmarks``."""
