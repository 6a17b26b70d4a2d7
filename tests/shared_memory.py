"""What a run may leave in /dev/shm: nothing."""

from __future__ import annotations

import os

import psutil

from gpg_megatron.host.reaper import SHARED_MEMORY, open_segments


def all_segments() -> set[str]:
    """Names of all shared-memory segments and semaphores."""
    return set(os.listdir(SHARED_MEMORY))


def abandoned_segments(before: set[str]) -> set[str]:
    """Segments that appeared since and that no living process has open."""
    return all_segments() - before - open_segments(psutil.pids())
