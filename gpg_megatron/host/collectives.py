"""Run something on rank 0 and give every rank its result, or its failure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar, cast

import torch
import torch.distributed as dist

from gpg_megatron.errors import RunError, UserError

T = TypeVar("T")
Broadcast = Callable[[Any], None]
"""broadcast with its group."""


class OnRank0(Protocol):
    """on_rank0 with its group."""

    def __call__(self, action: Callable[[], T], /) -> T: ...


class Rank0Failed(RunError):
    """Raised on the other ranks; rank 0 has raised, and will report, the failure itself."""

    everywhere = True


def on_rank0(action: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Collective. Without it a failure on rank 0 would leave the others waiting for a broadcast.

    Args:
        action: called on rank 0 only; its result must pickle.
        group: a group that holds rank 0 and can broadcast objects; None: the default group.

    Raises:
        The action's own exception on rank 0; elsewhere a UserError or Rank0Failed that
        carries its text.
    """
    box: list[object] = [None, None, False]
    failure: Exception | None = None
    if dist.get_rank() == 0:
        try:
            box[0] = action()
        except Exception as error:  # raised again below, on every rank
            failure = error
            box[1:] = [f"{type(error).__name__}: {error}", isinstance(error, UserError)]
    dist.broadcast_object_list(box, src=0, group=group)
    if failure is not None:
        raise failure
    if box[1] is not None:
        raise UserError(str(box[1])) if box[2] else Rank0Failed(str(box[1]))
    return cast(T, box[0])


def broadcast(array: Any, group: dist.ProcessGroup | None = None) -> None:
    """Collective. What rank 0 has in a numpy array is written into those of the other ranks, which
    have its type and shape; no copy is made on the way.

    Args:
        group: that holds rank 0, of gloo; None: the default group.
    """
    if array.size:
        # As bytes: gloo knows no integers of 16 bits.
        dist.broadcast(torch.from_numpy(array.reshape(-1).view("uint8")), src=0, group=group)


def kept_on_rank0(action: Callable[[], T], on_rank0: OnRank0) -> T | None:
    """Collective. As on_rank0, for a result that stays there; None elsewhere."""
    kept: list[T] = []
    on_rank0(lambda: kept.append(action()))
    return kept[0] if kept else None
