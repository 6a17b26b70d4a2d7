"""The stream: whole epochs, deterministic, resumable at any point."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpg_megatron.data.curriculum import open_stream
from gpg_megatron.data.stream import MixedStream, PromptStream
from gpg_megatron.errors import UserError
from gpg_megatron.types import Prompt
from tests.samples import int32


def prompts(n: int) -> list[Prompt]:
    return [
        Prompt(id=str(i), token_ids=int32((i,)), messages=(), ground_truth="", data_source="d")
        for i in range(n)
    ]


def mixed(
    files: Sequence[Sequence[Prompt]], weights: Sequence[float], *, seed: int, shuffle: bool
) -> MixedStream:
    return MixedStream(files, weights, partial(PromptStream, seed=seed, shuffle=shuffle))


def ids(taken: Sequence[Prompt]) -> list[int]:
    return [int(p.id) for p in taken]


def test_in_order_without_shuffling_and_across_epochs() -> None:
    stream = PromptStream(prompts(3), seed=1, shuffle=False)
    assert ids(stream.take(2)) == [0, 1]
    assert ids(stream.take(5)) == [2, 0, 1, 2, 0]
    assert ids(stream.take(0)) == []


@given(n=st.integers(1, 20), takes=st.lists(st.integers(0, 30), max_size=8), seed=st.integers())
def test_every_epoch_holds_every_prompt_once(n: int, takes: list[int], seed: int) -> None:
    stream = PromptStream(prompts(n), seed=seed, shuffle=True)
    drawn = [i for k in takes for i in ids(stream.take(k))]
    assert len(drawn) == sum(takes)
    for start in range(0, len(drawn) - n + 1, n):
        assert sorted(drawn[start : start + n]) == list(range(n))


@given(n=st.integers(1, 20), before=st.integers(0, 50), after=st.integers(0, 50))
def test_restore_goes_on_where_state_was_taken(n: int, before: int, after: int) -> None:
    first = PromptStream(prompts(n), seed=5, shuffle=True)
    first.take(before)
    state = json.loads(json.dumps(first.state()))
    expected = ids(first.take(after))
    second = PromptStream(prompts(n), seed=5, shuffle=True)
    second.take(3)
    second.restore(state)
    assert ids(second.take(after)) == expected


def test_epochs_and_seeds_differ() -> None:
    stream = PromptStream(prompts(50), seed=1, shuffle=True)
    first, second = ids(stream.take(50)), ids(stream.take(50))
    other = ids(PromptStream(prompts(50), seed=2, shuffle=True).take(50))
    again = ids(PromptStream(prompts(50), seed=1, shuffle=True).take(50))
    assert first == again
    assert first != second
    assert first != other


@pytest.mark.parametrize(("key", "n", "seed"), [("n_prompts", 4, 1), ("seed", 3, 2)])
def test_a_state_of_another_run_is_refused(key: str, n: int, seed: int) -> None:
    state = PromptStream(prompts(3), seed=1, shuffle=True).state()
    with pytest.raises(UserError, match=f"{key}="):
        PromptStream(prompts(n), seed=seed, shuffle=True).restore(state)


@pytest.mark.parametrize("change", ["content", "order", "shuffle"])
def test_as_many_other_prompts_are_refused(change: str) -> None:
    saved = PromptStream(prompts(3), seed=1, shuffle=True).state()
    others = prompts(3)
    if change == "content":
        others[1] = replace(others[1], ground_truth="other")
    if change == "order":
        others.reverse()
    stream = PromptStream(others, seed=1, shuffle=change != "shuffle")
    with pytest.raises(UserError, match="shuffle=" if change == "shuffle" else "digest="):
        stream.restore(saved)
    del saved["digest"], saved["shuffle"]  # as an earlier version saved it
    stream.restore(saved)


MIXES = st.lists(st.tuples(st.integers(1, 9), st.floats(0.05, 10.0)), min_size=1, max_size=5)


def files_of(sizes: Sequence[int]) -> list[list[Prompt]]:
    """Prompts whose ids are 100 * file + place."""
    everything = prompts(100 * len(sizes))
    return [everything[100 * i : 100 * i + n] for i, n in enumerate(sizes)]


@given(mix=MIXES, n=st.integers(0, 200))
def test_every_file_of_a_mix_gets_its_share(mix: list[tuple[int, float]], n: int) -> None:
    sizes, weights = zip(*mix, strict=True)
    drawn = ids(mixed(files_of(sizes), weights, seed=1, shuffle=True).take(n))
    for i, weight in enumerate(weights):
        mine = [x for x in drawn if x // 100 == i]
        assert abs(len(mine) - n * weight / sum(weights)) < len(sizes)
        # Whole epochs of each file, whatever its share.
        for start in range(0, len(mine) - sizes[i] + 1, sizes[i]):
            assert sorted(mine[start : start + sizes[i]]) == [100 * i + k for k in range(sizes[i])]


def test_a_mix_written_out() -> None:
    stream = mixed(files_of([2, 3]), [2.0, 1.0], seed=1, shuffle=False)
    assert ids(stream.take(9)) == [0, 100, 1, 0, 101, 1, 0, 102, 1]


@given(mix=MIXES, before=st.integers(0, 60), after=st.integers(0, 60))
def test_a_mix_goes_on_where_its_state_was_taken(
    mix: list[tuple[int, float]], before: int, after: int
) -> None:
    sizes, weights = zip(*mix, strict=True)
    first, second = (mixed(files_of(sizes), weights, seed=5, shuffle=True) for _ in range(2))
    first.take(before)
    state = json.loads(json.dumps(first.state()))
    second.take(4)
    second.restore(state)
    assert ids(second.take(after)) == ids(first.take(after))


def test_open_stream_mixes_only_with_weights() -> None:
    three = prompts(3)
    plain = partial(open_stream, shuffle=False, seed=1, curriculum="none", group_size=8)
    opened = partial(plain, three, per_file=(1, 2))
    assert ids(opened(weights=()).take(4)) == [0, 1, 2, 0]
    mixed = opened(weights=(3.0, 1.0))
    assert ids(mixed.take(8)) == [0, 0, 1, 0, 0, 0, 2, 0]
    with pytest.raises(UserError, match="training file 2 has no prompt"):
        plain(three, per_file=(3, 0), weights=(1.0, 1.0))
    with pytest.raises(UserError, match="of 0 weighted files, this run has 2"):
        mixed.restore(opened(weights=()).state())
    with pytest.raises(UserError, match="n_prompts=None"):
        opened(weights=()).restore(mixed.state())


def test_a_mix_goes_on_with_its_weights_only() -> None:
    saved = mixed(files_of([2, 3]), [2.0, 1.0], seed=1, shuffle=True).state()
    mixed(files_of([2, 3]), [4.0, 2.0], seed=1, shuffle=True).restore(saved)
    with pytest.raises(UserError, match=r"data\.train_weights"):
        mixed(files_of([2, 3]), [1.0, 1.0], seed=1, shuffle=True).restore(saved)
