"""Training samples to optimizer steps, ranks and packed micro-batches."""
