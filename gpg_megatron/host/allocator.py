"""Who hands out memory in processes whose tensors are in the host's.

glibc leaves holes between what lives long and what does not: a third of what a rank held. jemalloc,
which Ray brings, leaves fewer. It has to be there before a process starts.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from importlib import util
from pathlib import Path

_PRELOAD, _OPTIONS = "LD_PRELOAD", "MALLOC_CONF"
# Freed memory is kept for good, and given out again for requests of any size.
_KEEP = "narenas:1,dirty_decay_ms:-1,muzzy_decay_ms:-1,lg_extent_max_active_fit:12"
# Freed memory goes back after ten seconds; rollout/forked.py sees to what this leaves out.
_GIVE_BACK = "oversize_threshold:0"
# Names of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def allocator_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """What ranks are started with, beside the environment. Empty where Ray brings no jemalloc, or
    the user preloads something."""
    ray = util.find_spec("ray")
    if ray is None or ray.origin is None or _PRELOAD in environment:
        return {}
    library = Path(ray.origin).parent / "core" / "libjemalloc.so"
    if not library.is_file():
        return {}
    return {_PRELOAD: str(library), _OPTIONS: environment.get(_OPTIONS, _KEEP)}


def keep_freed_memory() -> None:
    """This process keeps what it frees, and does not give it back to the system: the next step
    wants it again, and the system clears page by page what it hands out. Those that it starts
    give back, engines among them."""
    if os.environ.get(_OPTIONS) == _KEEP:
        os.environ[_OPTIONS] = _GIVE_BACK
        return
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):  # glibc, musl has none
        for what, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_TOP_PAD, 64 << 20)):
            library.mallopt(what, value)
