"""Rollout: vLLM engines in Ray actors sample completions of the current weights."""
