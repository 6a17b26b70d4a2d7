"""Which prompts come next, by what became of their groups: data.curriculum.

A prompt whose group is all right or all wrong has no gradient, and its answers were sampled for
nothing. What is known of each prompt is part of the stream's state.

    take -> sampled and scored -> seen -> take ...

Between take and seen a prompt is out, and does not come a second time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import fmean
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from gpg_megatron.data.stream import MixedStream, PromptStream, Stream
from gpg_megatron.types import Prompt, ScoredGroup

RESTS = {True: (1, 3, 7), False: (1,)}
"""Turns that a prompt rests after a group that was all right (True) or all wrong, by how many of
them it had in a row; the last number goes on."""
SURE = 1e-6
"""Accuracy within this of 1 or 0 is all right or all wrong."""


class _Curriculum(PromptStream, ABC):
    """A stream that learns. Prompts are named by their place in the list."""

    def __init__(self, prompts: Sequence[Prompt], seed: int, shuffle: bool) -> None:
        super().__init__(prompts, seed, shuffle)
        self._place = {prompt.id: i for i, prompt in enumerate(self._prompts)}
        self._out: set[int] = set()

    def take(self, n: int) -> list[Prompt]:
        """The next n prompts; none twice as long as others are left."""
        chosen = self._choose(n)
        self.n_taken += n
        return [self._prompts[i] for i in chosen]

    def seen(self, groups: Sequence[ScoredGroup]) -> None:
        """What became of prompts that were taken, each once; those of other files are left out."""
        for group in groups:
            if (i := self._place.get(group.prompt.id)) is not None:
                self._out.discard(i)
                self._learn(i, [reward.accuracy for reward in group.rewards])

    def state(self) -> dict[str, Any]:
        """What restore() needs, as plain JSON."""
        return super().state() | {"out": sorted(self._out), type(self).__name__: self._memory()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where state() was taken; of another curriculum only the position is taken over."""
        super().restore(state)
        self._out = set(state.get("out", ()))
        self._remember(state.get(type(self).__name__) or {})

    @abstractmethod
    def _choose(self, n: int) -> list[int]:
        """The next n, which are out from now on."""

    @abstractmethod
    def _learn(self, i: int, accuracies: Sequence[float]) -> None:
        """Take in the answers to one."""

    @abstractmethod
    def _memory(self) -> dict[str, Any]:
        """What _remember needs, as plain JSON."""

    @abstractmethod
    def _remember(self, memory: Mapping[str, Any]) -> None:
        """Know what was known then; empty: nothing."""


class Pools(_Curriculum):
    """In the stream's order, without those at rest."""

    def __init__(self, prompts: Sequence[Prompt], seed: int, shuffle: bool) -> None:
        super().__init__(prompts, seed, shuffle)
        self._n_passed = 0
        """Turns of the endless order so far."""
        self._rests: dict[int, int] = {}
        """Prompt -> turns that it still rests."""
        self._streaks: dict[int, tuple[bool, int]] = {}
        """Prompt -> all right or all wrong, and how often in a row."""

    def _choose(self, n: int) -> list[int]:
        chosen: list[int] = []
        while len(chosen) < n:
            (i,) = self._places(self._n_passed, 1)
            self._n_passed += 1
            if i in self._out and len(self._out) < len(self._prompts):
                continue
            if rest := self._rests.pop(i, 0):
                self._rests |= {i: rest - 1} if rest > 1 else {}
            else:
                chosen.append(i)
                self._out.add(i)
        return chosen

    def _learn(self, i: int, accuracies: Sequence[float]) -> None:
        share = fmean(accuracies)
        before, row = self._streaks.pop(i, (False, 0))
        self._rests.pop(i, None)
        if min(share, 1 - share) > SURE:
            return
        right = share > 0.5
        row = row + 1 if before == right else 1
        self._streaks[i] = right, row
        self._rests[i] = RESTS[right][min(row, len(RESTS[right])) - 1]

    def _memory(self) -> dict[str, Any]:
        streaks = [[i, right, row] for i, (right, row) in sorted(self._streaks.items())]
        rests = [list(pair) for pair in sorted(self._rests.items())]
        return {"passed": self._n_passed, "streaks": streaks, "rests": rests}

    def _remember(self, memory: Mapping[str, Any]) -> None:
        self._n_passed = memory.get("passed", self.n_taken)
        self._streaks = {i: (right, row) for i, right, row in memory.get("streaks", ())}
        self._rests = {i: rest for i, rest in memory.get("rests", ())}


class Thompson(_Curriculum):
    """Those that are likely to be live, by one draw of each prompt's chance from what is known.

    Of a prompt with a right and b wrong answers the chance is drawn from Beta(1 + a, 1 + b). What
    is known fades by half for each epoch's worth of prompts that were taken since, because the
    policy changes. A prompt that is not known may have any chance, so it comes soon.
    """

    def __init__(
        self, prompts: Sequence[Prompt], seed: int, shuffle: bool, group_size: int
    ) -> None:
        """group_size: answers to each prompt, at least 2."""
        super().__init__(prompts, seed, shuffle)
        self._group_size = group_size
        self._counts = np.zeros((len(prompts), 2))
        """Right and wrong answers, as they counted when the prompt was last seen."""
        self._when = np.zeros(len(prompts), dtype=np.int64)
        """Prompts that had been taken then."""

    def _choose(self, n: int) -> list[int]:
        # The position is the seed, so that no random state has to be saved.
        rng = np.random.default_rng([self._seed, self.n_taken])
        right, wrong = self._faded(np.arange(len(self._prompts)))
        worth = live_chance(rng.beta(1 + right, 1 + wrong), self._group_size)
        worth[list(self._out)] -= 1.0  # only when no others are left
        best: list[int] = []
        while len(best) < n:
            best += np.argsort(-worth, kind="stable")[: n - len(best)].tolist()
        self._out.update(best)
        return [best[i] for i in rng.permutation(n)]

    def _faded(self, places: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """[2, places] answers as they count now."""
        age = (self.n_taken - self._when[places]) / len(self._prompts)
        return (self._counts[places] * (0.5**age)[:, None]).T

    def _learn(self, i: int, accuracies: Sequence[float]) -> None:
        right = sum(accuracies)
        self._counts[i] = self._faded(np.array([i]))[:, 0] + (right, len(accuracies) - right)
        self._when[i] = self.n_taken

    def _memory(self) -> dict[str, Any]:
        known = np.flatnonzero(self._counts.any(axis=1)).tolist()
        return {"counts": [[i, *self._counts[i].tolist(), int(self._when[i])] for i in known]}

    def _remember(self, memory: Mapping[str, Any]) -> None:
        self._counts[:], self._when[:] = 0.0, 0
        for i, right, wrong, when in memory.get("counts", ()):
            self._counts[i], self._when[i] = (right, wrong), when


def live_chance(rates: npt.NDArray[np.float64], group_size: int) -> npt.NDArray[np.float64]:
    """That answers which are right with these probabilities are neither all right nor all wrong:
    1 - p^G - (1 - p)^G, element by element."""
    whole: npt.NDArray[np.float64] = 1 - rates**group_size - (1 - rates) ** group_size
    return whole


def open_stream(
    prompts: Sequence[Prompt],
    *,
    per_file: Sequence[int],
    weights: Sequence[float],
    seed: int,
    shuffle: bool,
    curriculum: Literal["none", "thompson", "pools"],
    group_size: int,
) -> Stream:
    """One list of all prompts, or, with weights, a mix of the files.

    Args:
        per_file: how many of the prompts, which are in file order, each file gave.
        weights: of each file; empty: no mix.
        curriculum: how prompts are chosen, in each file for itself.
        group_size: answers to each prompt.

    Raises:
        UserError: a file of a mix gave no prompt.
    """

    def of(chosen: Sequence[Prompt]) -> PromptStream:
        if curriculum == "thompson":
            return Thompson(chosen, seed, shuffle, group_size)
        return (Pools if curriculum == "pools" else PromptStream)(chosen, seed, shuffle)

    if not weights:
        return of(prompts)
    starts = [sum(per_file[:i]) for i in range(len(per_file) + 1)]
    return MixedStream([prompts[a:b] for a, b in pairwise(starts)], weights, of)
