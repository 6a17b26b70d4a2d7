"""A small model and its data, made on the spot."""
