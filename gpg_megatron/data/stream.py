"""An endless, deterministic, resumable stream of prompts."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from gpg_megatron.errors import UserError
from gpg_megatron.types import Prompt


class PromptStream:
    """Epochs without end over a list of prompts.

    Every epoch holds each prompt exactly once. Its order depends on (seed, epoch) alone, so
    the position is the whole state. A take may span epochs; nothing is dropped.
    """

    def __init__(self, prompts: Sequence[Prompt], seed: int, shuffle: bool) -> None:
        assert prompts, "a stream needs at least one prompt"
        self._prompts = tuple(prompts)
        self._seed = seed
        self._shuffle = shuffle
        self._move_to(epoch=0, position=0)

    def take(self, n: int) -> list[Prompt]:
        """The next n prompts."""
        assert n >= 0, n
        taken: list[Prompt] = []
        while len(taken) < n:
            if self._position == len(self._order):
                self._move_to(epoch=self._epoch + 1, position=0)
            end = min(len(self._order), self._position + n - len(taken))
            taken += [self._prompts[i] for i in self._order[self._position : end]]
            self._position = end
        return taken

    def state(self) -> dict[str, int]:
        """What restore() needs; plain integers."""
        return {
            "epoch": self._epoch,
            "position": self._position,
            "n_prompts": len(self._prompts),
            "seed": self._seed,
        }

    def restore(self, state: Mapping[str, int]) -> None:
        """Go on exactly where state() was taken.

        Raises:
            UserError: the state belongs to another number of prompts or another seed.
        """
        for key, here in (("n_prompts", len(self._prompts)), ("seed", self._seed)):
            if state[key] != here:
                raise UserError(
                    f"the saved data position has {key}={state[key]}, this run {here}; "
                    "expected the data files and the seed of the saved run"
                )
        self._move_to(epoch=state["epoch"], position=state["position"])

    def _move_to(self, *, epoch: int, position: int) -> None:
        self._epoch = epoch
        self._position = position
        order = list(range(len(self._prompts)))
        if self._shuffle:
            # A string seed is hashed with SHA-512: the same on every machine and Python.
            random.Random(f"{self._seed}/{epoch}").shuffle(order)
        self._order = order
