"""A few threads that work through a list, holding no more memory at once than allowed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Generic, TypeVar

from gpg_megatron.checkpoint.raw_io import Scratch

T = TypeVar("T")


class Budget:
    """Bytes that all threads may hold at once. One item larger than that is let in alone."""

    def __init__(self, n_bytes: int) -> None:
        self._limit = n_bytes
        self._used: dict[int, int] = {}
        self._scratch: dict[int, Scratch] = {}
        self._changed = threading.Condition()

    @contextmanager
    def hold(self, thread: int, n_bytes: int) -> Iterator[Scratch]:
        """Wait until there is room, and keep it for the block; yields the thread's memory."""
        with self._changed:
            self._changed.wait_for(
                lambda: not self._used or sum(self._used.values()) + n_bytes <= self._limit
            )
            self._used[thread] = n_bytes
            scratch = self._scratch.pop(thread, None) or Scratch()
        try:
            yield scratch
        finally:
            with self._changed:
                del self._used[thread]
                # What was larger than the limit is given back.
                if n_bytes <= self._limit // 2:
                    self._scratch[thread] = scratch
                self._changed.notify_all()


class _Queue(Generic[T]):
    def __init__(self, items: Sequence[T]) -> None:
        self._items = iter(items)
        self._lock = threading.Lock()
        self.stopped = False

    def next(self) -> T | None:
        with self._lock:
            return None if self.stopped else next(self._items, None)


def work_through(
    items: Sequence[T], make_worker: Callable[[int], Callable[[T], None]], n_threads: int
) -> None:
    """Hand each item to one of n_threads workers, in order. The first failure ends all.

    Args:
        make_worker: number of the thread -> what it does with an item.
    """
    queue = _Queue(items)

    def run(number: int) -> None:
        worker = make_worker(number)
        try:
            while (item := queue.next()) is not None:
                worker(item)
        except BaseException:
            queue.stopped = True
            raise

    with ThreadPoolExecutor(n_threads) as pool:
        runs = [pool.submit(run, number) for number in range(n_threads)]
    for done in runs:
        done.result()
