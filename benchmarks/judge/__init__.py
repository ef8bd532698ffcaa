"""Whether a result keeps the limits that peftkern sets itself: arithmetic on the rows of a JSON file."""
