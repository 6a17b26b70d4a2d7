"""vLLM's processes, forked from one that has imported vLLM already.

    Engine (actor) --starts--> fork server: imports vLLM while the actor does
           '-------asks--------> '--forks--> EngineCore --asks--> workers, TP > 1

Inside an actor of Ray vLLM spawns them: each imports vLLM anew, one after the other, for some 15 s
of a core. An engine on CPU shares few cores with the policy; on GPUs vLLM's own way stays.
"""

from __future__ import annotations

import ctypes
import multiprocessing
from importlib import import_module
from multiprocessing import forkserver
from typing import Any

_PRELOADED = (
    "vllm.v1.engine.core",
    "vllm.v1.executor.multiproc_executor",
    "vllm.v1.worker.cpu_worker",
    "gpg_megatron.rollout.forked_now",
)
_STARTERS = ("vllm.v1.engine.utils", "vllm.v1.executor.multiproc_executor")
"""Modules of vLLM 0.32 that start processes."""


def begin() -> None:
    """Before vLLM is imported, when os.environ is as its processes shall have it."""
    multiprocessing.set_forkserver_preload(list(_PRELOADED))
    forkserver.ensure_running()


def fork_what_vllm_starts() -> None:
    """In this process. Its import of vLLM comes before."""
    for name in _STARTERS:
        module: Any = import_module(name)
        module.get_mp_context = lambda: multiprocessing.get_context("forkserver")


def keep_freed_memory_a_while() -> None:
    """As long as jemalloc's options say, that of requests beyond 8 MiB too, which it gives back at
    once: the logits of a step, and the next step wants them. Its own option against that leaves out
    the first arena (version 5.3), which is the main thread's. Processes that are forked from this
    one have it. Without jemalloc nothing is done."""
    library = ctypes.CDLL(None)
    if hasattr(library, "mallctl"):
        limit = ctypes.c_size_t(2**62)
        name, size = b"arena.0.oversize_threshold", ctypes.c_size_t(ctypes.sizeof(limit))
        library.mallctl(name, None, None, ctypes.byref(limit), size)
