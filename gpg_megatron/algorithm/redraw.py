"""Which of the groups that were drawn a step trains on: the paper's beta_th.

carried groups + first draw -> too few are live: another draw, and another
                            -> live groups beyond the batch size are carried to the next step
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gpg_megatron.algorithm.advantages import is_live
from gpg_megatron.config.algorithm import AlgorithmConfig
from gpg_megatron.errors import RunError
from gpg_megatron.types import ScoredGroup


class RedrawsExhausted(RunError):
    """Too few groups are live after max_redraws, and on_exhausted is error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """What one step does with the groups that it has."""

    groups: tuple[ScoredGroup, ...]
    """To train on."""
    carried: tuple[ScoredGroup, ...]
    """Live ones that the next step begins with."""
    n_filtered: int
    """Dead ones that are left out, of alpha and of the denominators too."""
    exhausted: bool
    """Too few groups are live, and no draw was left."""
    skipped: bool
    """No update is made."""


def select(groups: Sequence[ScoredGroup], config: AlgorithmConfig, *, batch_size: int) -> Selection:
    """Decide what to train on when drawing has ended.

    After redraws the batch is one draw again (arXiv 2504.02546, algorithm 1): all live groups, and
    dead ones in the order drawn until it is full, so that alpha is at most 1 / beta_th. Live groups
    beyond batch_size, the youngest, are carried over. With filter_groups every dead group is left
    out, unless nothing else is there: then the step has no gradient.

    Raises:
        RedrawsExhausted
    """
    live = [group for group in groups if is_live(group, config.dead_by)]
    exhausted = len(live) < config.wanted_fraction * batch_size
    if exhausted and config.on_exhausted == "error":
        raise RedrawsExhausted(
            f"after {config.max_redraws} redraws {len(live)} groups are live of the "
            f"{config.wanted_fraction * batch_size:g} that a batch needs (algorithm.beta_th, "
            "algorithm.filter_groups); algorithm.on_exhausted=train or skip goes on"
        )
    skipped = exhausted and config.on_exhausted == "skip"
    is_kept = {id(group) for group in live[:batch_size]}
    is_living = {id(group) for group in live}
    dead = [group for group in groups if id(group) not in is_living]
    room = 0 if config.filter_groups and live else batch_size - len(is_kept)
    is_kept |= {id(group) for group in dead[:room]}
    return Selection(
        groups=tuple(group for group in groups if id(group) in is_kept),
        carried=tuple(live if skipped else live[batch_size:]),
        n_filtered=max(0, len(dead) - room),
        exhausted=exhausted,
        skipped=skipped,
    )
