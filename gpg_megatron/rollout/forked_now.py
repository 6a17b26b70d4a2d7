"""Imported by the fork server, so that what it forks asks it for workers, too (forked.py)."""

from gpg_megatron.rollout.forked import fork_what_vllm_starts

fork_what_vllm_starts()
