"""Many adapters of one layer: their memory, the table that kernels read, and the route of a batch."""
