"""A few threads that work through a list, holding no more memory at once than allowed."""

from __future__ import annotations

import math
import mmap
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")

N_THREADS = 2
MEMORY_BYTES = 384 << 20
"""In use by all threads together; a larger parameter is handled alone."""


class Scratch:
    """Memory for one tensor at a time. It is used again: fresh pages cost more than the copy."""

    def __init__(self, number: int) -> None:
        self.number = number
        """Differs from that of every other one in use."""
        self.give_back()

    def give_back(self) -> None:
        """Keep no memory."""
        self._memory = mmap.mmap(-1, mmap.PAGESIZE)

    def tensor(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Uninitialised, alone in its storage; valid until the next call."""
        n_bytes = math.prod(shape) * dtype.itemsize
        if n_bytes > len(self._memory):
            self._memory = mmap.mmap(-1, n_bytes)
            self._memory.madvise(mmap.MADV_HUGEPAGE)
        view = memoryview(self._memory)[:n_bytes]
        return torch.frombuffer(view, dtype=dtype).view(tuple(shape))


class Budget:
    """MEMORY_BYTES that all threads may hold at once. One item larger than that is let in alone."""

    def __init__(self) -> None:
        self._held: list[int] = []
        self._free = [Scratch(number) for number in range(N_THREADS)]
        self._changed = threading.Condition()

    @contextmanager
    def hold(self, n_bytes: int) -> Iterator[Scratch]:
        """Wait until there is room, and keep it for the block."""
        with self._changed:
            self._changed.wait_for(
                lambda: not self._held or sum(self._held) + n_bytes <= MEMORY_BYTES
            )
            self._held.append(n_bytes)
            scratch = self._free.pop()
        try:
            yield scratch
        finally:
            with self._changed:
                self._held.remove(n_bytes)
                if n_bytes > MEMORY_BYTES // 2:
                    scratch.give_back()
                self._free.append(scratch)
                self._changed.notify_all()


def work_through(work: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """Hand each item to one of N_THREADS threads, in order. The first failure ends all."""
    with ThreadPoolExecutor(N_THREADS) as pool:
        return list(pool.map(work, items))
