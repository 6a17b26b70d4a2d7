"""Groups survive the way to another rank and into a checkpoint, bit by bit."""

from __future__ import annotations

from typing import get_args

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from gpg_megatron.loop.group_arrays import flatten, unflatten
from gpg_megatron.types import Completion, FinishReason, Prompt, Reward, ScoredGroup, VersionSpan
from tests.samples import float32, int32, plain

TEXT = st.text(max_size=8)
NUMBER = st.floats(allow_nan=False, allow_infinity=False)
LOGPROB = st.floats(width=32, allow_nan=False)
TOKENS = st.lists(st.integers(0, 10**6), max_size=4)


@st.composite
def groups(draw: st.DrawFn) -> ScoredGroup:
    prompt = Prompt(
        id=draw(TEXT),
        token_ids=int32(draw(TOKENS)),
        messages=tuple(draw(st.lists(st.dictionaries(TEXT, TEXT, max_size=2), max_size=2))),
        ground_truth=draw(TEXT),
        data_source=draw(TEXT),
    )
    completions, rewards = [], []
    for index in range(draw(st.integers(1, 3))):
        tokens = int32(draw(TOKENS))
        completions.append(
            Completion(
                prompt_id=prompt.id,
                index=index,
                token_ids=tokens,
                logprobs=float32(draw(LOGPROB) for _ in tokens),
                finish_reason=draw(st.sampled_from(get_args(FinishReason))),
                text=draw(TEXT),
                versions=(VersionSpan(version=3, start=0, end=len(tokens)),) if len(tokens) else (),
            )
        )
        parts = draw(st.dictionaries(TEXT, NUMBER, max_size=2))
        rewards.append(Reward(score=draw(NUMBER), accuracy=draw(NUMBER), parts=parts))
    return ScoredGroup(prompt=prompt, completions=tuple(completions), rewards=tuple(rewards))


@given(st.lists(groups(), max_size=3))
def test_a_round_trip(some: list[ScoredGroup]) -> None:
    flat = flatten(some)
    found = unflatten(flat)
    assert plain(found) == plain(some)
    answers = [c for group in found for c in group.completions]
    assert all(np.shares_memory(c.logprobs, flat.logprobs) for c in answers if len(c.logprobs))
