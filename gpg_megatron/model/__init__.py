"""What a config.json says of a model: its shape, and what a token costs."""
