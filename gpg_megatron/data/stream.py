"""Endless, deterministic, resumable streams of prompts."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any

from gpg_megatron.errors import UserError
from gpg_megatron.types import Prompt, ScoredGroup


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
        self._order = lru_cache(maxsize=1)(self._make_order)
        self.n_taken = 0
        """Prompts taken since the beginning."""

    def take(self, n: int) -> list[Prompt]:
        """The next n prompts."""
        assert n >= 0, n
        self.n_taken += n
        return [self._prompts[i] for i in self._places(self.n_taken - n, n)]

    def seen(self, groups: Sequence[ScoredGroup]) -> None:
        """What became of prompts that were taken, each once: nothing follows from it here."""

    def state(self) -> dict[str, Any]:
        """What restore() needs, as plain JSON."""
        epoch, position = divmod(self.n_taken, len(self._prompts))
        return {"epoch": epoch, "position": position, **self._identity}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on exactly where state() was taken.

        Raises:
            UserError: the state belongs to other prompts, another order of them, or another seed.
        """
        for key, here in self._identity.items():
            # Earlier versions saved neither shuffle nor digest.
            if state.get(key, here if key in ("shuffle", "digest") else None) != here:
                raise UserError(
                    f"the saved data position has {key}={state.get(key)}, this run {here}; "
                    "expected the data files, data.shuffle and the seed of the saved run"
                )
        self.n_taken = state["epoch"] * len(self._prompts) + state["position"]

    @cached_property
    def _identity(self) -> dict[str, Any]:
        """What decides which prompts come, and in which order."""
        digest = hashlib.blake2b(digest_size=16)
        for p in self._prompts:
            ids = tuple(p.token_ids.tolist())
            digest.update(repr((p.id, ids, p.ground_truth, p.data_source)).encode())
        return {
            "n_prompts": len(self._prompts),
            "seed": self._seed,
            "shuffle": self._shuffle,
            "digest": digest.hexdigest(),
        }

    def _places(self, start: int, n: int) -> list[int]:
        """Which prompts are n of the endless order, from number `start`."""
        numbers = (divmod(i, len(self._prompts)) for i in range(start, start + n))
        return [self._order(epoch)[position] for epoch, position in numbers]

    def _make_order(self, epoch: int) -> list[int]:
        order = list(range(len(self._prompts)))
        if self._shuffle:
            # A string seed is hashed with SHA-512: the same on every machine and Python.
            random.Random(f"{self._seed}/{epoch}").shuffle(order)
        return order


class MixedStream:
    """Prompts of several files, each with its share of whatever is drawn.

    Every prompt comes from the file that is furthest behind its share, so that after any number
    of prompts a file is less than one prompt per file away from it. Within a file the order is
    that of PromptStream: a file with more than its size's share begins its next epoch earlier.
    """

    def __init__(
        self,
        files: Sequence[Sequence[Prompt]],
        weights: Sequence[float],
        stream: Callable[[Sequence[Prompt]], PromptStream],
    ) -> None:
        """
        Args:
            weights: one for each file, in any unit.
            stream: makes that of a file.
        """
        for number, prompts in enumerate(files, start=1):
            if not prompts:
                raise UserError(
                    f"data.train_weights: training file {number} has no prompt that is short "
                    f"enough; expected at least one"
                )
        self._streams = [stream(prompts) for prompts in files]
        total = sum(weights)
        self._shares = [weight / total for weight in weights]

    def take(self, n: int) -> list[Prompt]:
        """The next n prompts."""
        taken = [stream.n_taken for stream in self._streams]
        turns: list[int] = []
        for drawn in range(sum(taken), sum(taken) + n):
            counts = zip(self._shares, taken, strict=True)
            behind = [share * (drawn + 1) - count for share, count in counts]
            turns.append(behind.index(max(behind)))
            taken[turns[-1]] += 1
        files = [iter(s.take(turns.count(i))) for i, s in enumerate(self._streams)]
        return [next(files[i]) for i in turns]

    def seen(self, groups: Sequence[ScoredGroup]) -> None:
        """What became of prompts that were taken, each once."""
        for stream in self._streams:
            stream.seen(groups)

    def state(self) -> dict[str, Any]:
        """What restore() needs: each file's share, and the state of its stream."""
        files = [stream.state() for stream in self._streams]
        return {"shares": self._shares, "files": files}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on exactly where state() was taken.

        Raises:
            UserError: the state belongs to other files, weights or another seed.
        """
        files = state.get("files", ())
        if len(files) != len(self._streams):
            raise UserError(
                f"the saved data position is of {len(files)} weighted files, this run has "
                f"{len(self._streams)}; expected the data files and weights of the saved run"
            )
        if state["shares"] != self._shares:
            raise UserError(
                f"the saved run drew from its files with the shares {state['shares']}, this one "
                f"with {self._shares}; expected the data.train_weights of the saved run"
            )
        for stream, part in zip(self._streams, files, strict=True):
            stream.restore(part)


Stream = PromptStream | MixedStream
