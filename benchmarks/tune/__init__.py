"""``peftkern tune``: tables of what is fastest on this machine."""
