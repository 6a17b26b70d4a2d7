"""Imported by the fork server: what it forks asks it for workers, too (forked.py), and keeps memory
from one step to the next."""

from gpg_megatron.rollout.forked import fork_what_vllm_starts, keep_freed_memory_a_while

keep_freed_memory_a_while()
fork_what_vllm_starts()
