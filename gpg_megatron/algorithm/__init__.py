"""GPG as pure functions: advantages, aggregation weights, the loss."""
