"""Which GPUs, and which share of their memory, policy and engines have."""
