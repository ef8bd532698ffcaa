"""Problem sets and the error measure, used by tests, ``peftkern verify`` and the benchmarks."""
