"""What makes engines generate, on rank 0, while all ranks stand by: engines that replace lost ones
get their weights in the middle of it.

rank 0:  action in a thread --> done? --> its result -----------.
                       ^          '-> engines wait for weights   | broadcast
all:                   '---------------- publish <--------------'
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

from gpg_megatron.host.collectives import OnRank0
from gpg_megatron.rollout.fleet import Fleet

T = TypeVar("T")
LOOK_S = 0.05


class Generating:
    """In place of on_rank0, for actions that wait for engines. Called where on_rank0 is."""

    def __init__(self, fleet: Fleet | None, on_rank0: OnRank0) -> None:
        """fleet: on rank 0; None elsewhere."""
        self._fleet = fleet
        self._on_rank0 = on_rank0
        self.publish: Callable[[], None]
        """Collective: give the engines the weights that they are to generate with."""

    def __call__(self, action: Callable[[], T], /) -> T:
        """Collective. Raises as on_rank0 does."""
        task = None if self._fleet is None else _begun(action)

        def look() -> tuple[T] | None:
            assert self._fleet is not None and task is not None
            while not wait([task], timeout=LOOK_S).done:
                if self._fleet.waits_for_weights:
                    return None
            return (task.result(),)

        while (answer := self._on_rank0(look)) is None:
            self.publish()
        return answer[0]


def _begun(action: Callable[[], T]) -> Future[T]:
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(action())
        except Exception as error:  # raised again where the result is taken
            future.set_exception(error)

    # A daemon: a run that fails elsewhere does not wait for the engines.
    threading.Thread(target=run, name="generating", daemon=True).start()
    return future
