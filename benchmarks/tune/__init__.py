"""``peftkern bench --tune``: measured tables of the fastest candidate."""
