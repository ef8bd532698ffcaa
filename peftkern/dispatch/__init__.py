"""From an op and its arguments to one back end."""
