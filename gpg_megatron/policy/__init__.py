"""The Megatron-Core policy: model, log-probs, optimizer step. The only room that knows Megatron."""
