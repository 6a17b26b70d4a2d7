"""The stream: whole epochs, deterministic, resumable at any point."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpg_megatron.data.stream import PromptStream
from gpg_megatron.errors import UserError
from gpg_megatron.types import Prompt


def prompts(n):
    return [
        Prompt(id=str(i), token_ids=(i,), messages=(), ground_truth="", data_source="d")
        for i in range(n)
    ]


def ids(taken):
    return [int(p.id) for p in taken]


def test_in_order_without_shuffling_and_across_epochs():
    stream = PromptStream(prompts(3), seed=1, shuffle=False)
    assert ids(stream.take(2)) == [0, 1]
    assert ids(stream.take(5)) == [2, 0, 1, 2, 0]
    assert ids(stream.take(0)) == []


@given(n=st.integers(1, 20), takes=st.lists(st.integers(0, 30), max_size=8), seed=st.integers())
def test_every_epoch_holds_every_prompt_once(n, takes, seed):
    stream = PromptStream(prompts(n), seed=seed, shuffle=True)
    drawn = [i for k in takes for i in ids(stream.take(k))]
    assert len(drawn) == sum(takes)
    for start in range(0, len(drawn) - n + 1, n):
        assert sorted(drawn[start : start + n]) == list(range(n))


@given(n=st.integers(1, 20), before=st.integers(0, 50), after=st.integers(0, 50))
def test_restore_goes_on_where_state_was_taken(n, before, after):
    first = PromptStream(prompts(n), seed=5, shuffle=True)
    first.take(before)
    state = json.loads(json.dumps(first.state()))
    expected = ids(first.take(after))
    second = PromptStream(prompts(n), seed=5, shuffle=True)
    second.take(3)
    second.restore(state)
    assert ids(second.take(after)) == expected


def test_epochs_and_seeds_differ():
    stream = PromptStream(prompts(50), seed=1, shuffle=True)
    first, second = ids(stream.take(50)), ids(stream.take(50))
    other = ids(PromptStream(prompts(50), seed=2, shuffle=True).take(50))
    again = ids(PromptStream(prompts(50), seed=1, shuffle=True).take(50))
    assert first == again
    assert first != second
    assert first != other


@pytest.mark.parametrize(("key", "n", "seed"), [("n_prompts", 4, 1), ("seed", 3, 2)])
def test_a_state_of_another_run_is_refused(key, n, seed):
    state = PromptStream(prompts(3), seed=1, shuffle=True).state()
    with pytest.raises(UserError, match=f"{key}="):
        PromptStream(prompts(n), seed=seed, shuffle=True).restore(state)
