"""``peftkern verify --static``: what compilers made of every kernel, held against recorded bounds."""
