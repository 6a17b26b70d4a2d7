"""What every rank says of itself, beside the collectives in which it may be stuck."""

from __future__ import annotations

import torch.distributed as dist


class Beats:
    """Through the rendezvous' store; used by one thread of each rank."""

    def __init__(self, rank: int, world_size: int) -> None:
        """After the process group was made."""
        store = dist.distributed_c10d._get_default_store()
        self._store = dist.PrefixStore("beats", store)
        self._rank = rank
        self._world_size = world_size

    def tell(self, text: str) -> None:
        """This rank's, in place of what it told before."""
        try:
            self._store.set(str(self._rank), text)
        except dist.DistError:  # the store has ended, and soon the run does
            return

    def hear(self) -> dict[int, str]:
        """What the other ranks told last; "" of one that has told nothing yet."""
        others = [rank for rank in range(self._world_size) if rank != self._rank]
        try:
            return {rank: self._told(rank) for rank in others}
        except dist.DistError:
            return {}

    def hear_one(self) -> tuple[int, str]:
        """As hear, of the rank before this one, so that each is heard by one other."""
        rank = (self._rank - 1) % self._world_size
        try:
            return rank, self._told(rank)
        except dist.DistError:
            return rank, ""

    def _told(self, rank: int) -> str:
        return self._store.get(str(rank)).decode() if self._store.check([str(rank)]) else ""
