"""``peftkern verify``: random problems against fp64, and the audit of compiled kernels."""
