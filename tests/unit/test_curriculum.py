"""Which prompts come next: by hand, over simulated prompts, and across a resume."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpg_megatron.config.loading import load_config
from gpg_megatron.data.curriculum import Pools, live_chance, open_stream
from gpg_megatron.data.stream import Stream
from gpg_megatron.errors import UserError
from gpg_megatron.types import Prompt, Reward, ScoredGroup
from tests.unit.test_data_stream import ids, prompts

Kind = Literal["none", "thompson", "pools"]
KINDS: tuple[Kind, ...] = ("none", "thompson", "pools")
GROUP = 8


def opened(kind: Kind, n: int, seed: int = 1, files: Sequence[int] = ()) -> Stream:
    return open_stream(
        prompts(n),
        per_file=files or [n],
        weights=[1.0] * len(files),
        seed=seed,
        shuffle=True,
        curriculum=kind,
        group_size=GROUP,
    )


def answered(prompt: Prompt, *accuracies: float) -> ScoredGroup:
    rewards = tuple(Reward(score=a, accuracy=a, parts={}) for a in accuracies)
    return ScoredGroup(prompt=prompt, completions=(), rewards=rewards)


def answers(taken: Sequence[Prompt], rates: Sequence[float], rng: np.random.Generator) -> list[int]:
    """Right answers of each group."""
    return [int(rng.binomial(GROUP, rates[i])) for i in ids(taken)]


def groups_of(taken: Sequence[Prompt], right: Sequence[int]) -> list[ScoredGroup]:
    return [
        answered(prompt, *[1.0] * n, *[0.0] * (GROUP - n))
        for prompt, n in zip(taken, right, strict=True)
    ]


def test_pools_by_hand() -> None:
    """Prompt 0 is always right: it rests 1, 3, 7, 7 turns. 1 is always wrong: it comes every other
    turn. 2 is live: it comes in every turn."""
    stream = Pools(prompts(3), seed=1, shuffle=False)
    turns: list[int] = []
    for _ in range(40):
        (prompt,) = stream.take(1)
        turns.append(int(prompt.id))
        outcome = {0: (1.0, 1.0), 1: (0.0, 0.0), 2: (1.0, 0.0)}[turns[-1]]
        stream.seen([answered(prompt, *outcome)])
    assert turns[:12] == [0, 1, 2, 2, 0, 1, 2, 2, 1, 2, 2, 0]
    rounds = [turns[:k].count(2) for k, i in enumerate(turns) if i == 0]
    assert rounds == [0, 2, 6, 14, 22]
    counts = Counter(turns)
    assert abs(counts[2] - 2 * counts[1]) <= 2


def test_a_prompt_that_fails_again_begins_a_new_row() -> None:
    stream = Pools(prompts(2), seed=1, shuffle=False)
    first = stream.take(2)[0]
    rests = []
    for outcome in ([1.0] * 2, [1.0] * 2, [0.0] * 2, [1.0] * 2, [0.5, 0.5], [1.0] * 2):
        stream.seen([answered(first, *outcome)])
        rests.append(stream.state()["Pools"]["rests"])
    assert rests == [[[0, 1]], [[0, 3]], [[0, 1]], [[0, 1]], [], [[0, 1]]]


def test_the_chance_to_be_live_by_hand() -> None:
    found = live_chance(np.array([0.0, 0.5, 1.0]), 3)
    assert found.tolist() == [0.0, 0.75, 0.0]


def live_share(kind: Kind, rates: Callable[[int], list[float]], n: int, batches: int) -> float:
    """Of the groups of a run whose prompts have these rates in each batch."""
    stream, rng = opened(kind, n), np.random.default_rng(7)
    live = 0
    for batch in range(batches):
        taken = stream.take(16)
        right = answers(taken, rates(batch), rng)
        live += sum(0 < k < GROUP for k in right)
        stream.seen(groups_of(taken, right))
    return live / (16 * batches)


def test_more_groups_are_live() -> None:
    """Of 128 prompts 40 % are always right, 30 % always wrong; twelve epochs' worth of draws."""
    rates = [1.0] * 51 + [0.0] * 38 + [0.2, 0.5, 0.8] * 13
    share = {kind: live_share(kind, lambda _: rates, len(rates), 96) for kind in KINDS}
    assert share["none"] == pytest.approx(0.3, abs=0.03)
    assert share["pools"] > 1.6 * share["none"]
    assert share["thompson"] > 1.6 * share["none"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_always_wrong_is_found_when_the_policy_can_do_it(kind: Kind) -> None:
    """At first 16 of 128 prompts are live and the others always wrong; then those are live and the
    16 always right."""
    first = [0.5] * 16 + [0.0] * 112
    later = [1.0] * 16 + [0.5] * 112
    share = live_share(kind, lambda batch: first if batch < 24 else later, 128, 48)
    plain = (16 / 128 + 112 / 128) / 2
    assert share > 0.95 * plain
    if kind != "none":
        assert share > 1.1 * plain


@settings(max_examples=30, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    n=st.integers(2, 12),
    takes=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    cut=st.integers(0, 5),
    n_files=st.integers(1, 2),
)
def test_a_resumed_stream_goes_on_as_the_one_that_was_saved(
    kind: Kind, n: int, takes: list[int], cut: int, n_files: int
) -> None:
    """Whether the prompts of the last batch have been seen or not."""
    files = [n // 2, n - n // 2] if n_files == 2 else []
    make = partial(opened, kind, n, files=files)
    whole, rng = make(), np.random.default_rng(3)
    rates = np.random.default_rng(4).random(n).round().tolist()
    rest: Stream | None = None
    pending: list[ScoredGroup] = []
    for number, k in enumerate(takes):
        if number == cut:
            rest = make()
            rest.restore(json.loads(json.dumps(whole.state())))
        for stream in [whole] if rest is None else [whole, rest]:
            stream.seen(pending)
        taken = whole.take(k)
        assert rest is None or ids(rest.take(k)) == ids(taken)
        pending = groups_of(taken, answers(taken, rates, rng))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [5, 40])
def test_no_prompt_comes_twice_before_it_was_seen(kind: Kind, n: int) -> None:
    stream = opened(kind, n)
    first, second = stream.take(2), stream.take(3)
    assert len(set(ids([*first, *second]))) == 5
    stream.seen(groups_of([*first, *second], [GROUP] * 5))
    assert len(ids(stream.take(2 * n))) == 2 * n


def test_a_position_goes_over_from_one_curriculum_to_another() -> None:
    for before in KINDS:
        for after in KINDS:
            stream, other = opened(before, 6), opened(after, 6)
            taken = stream.take(4)
            stream.seen(groups_of(taken, [0, 4, 8, 8]))
            other.restore(json.loads(json.dumps(stream.state())))
            assert len(other.take(4)) == 4


def test_groups_of_one_have_nothing_to_choose_by() -> None:
    given_keys = ["model.path=m", "data.train_files=[t]", "rollout.n=1", "algorithm.preset=verl"]
    load_config(None, given_keys)
    with pytest.raises(UserError, match="data.curriculum=pools looks for prompts"):
        load_config(None, [*given_keys, "data.curriculum=pools"])
