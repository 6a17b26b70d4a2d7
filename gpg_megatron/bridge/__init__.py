"""Moving weights between Hugging Face files, Megatron shards and vLLM workers."""
