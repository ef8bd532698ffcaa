"""What ops are compared with, and peftkern's own ways beside each other."""
