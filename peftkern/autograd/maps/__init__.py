"""Linear maps that few numbers make, added to y in place: Kronecker products, circulants."""
