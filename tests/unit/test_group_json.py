"""A group that waits for the next step survives a checkpoint, bit by bit."""

from __future__ import annotations

import json
from typing import get_args

from hypothesis import given
from hypothesis import strategies as st

from gpg_megatron.loop.group_json import from_json, to_json
from gpg_megatron.types import Completion, FinishReason, Prompt, Reward, ScoredGroup, VersionSpan

TEXT = st.text(max_size=8)
NUMBER = st.floats(allow_nan=False, allow_infinity=False)
TOKENS = st.lists(st.integers(0, 10**6), max_size=4)


@st.composite
def groups(draw: st.DrawFn) -> ScoredGroup:
    prompt = Prompt(
        id=draw(TEXT),
        token_ids=tuple(draw(TOKENS)),
        messages=tuple(draw(st.lists(st.dictionaries(TEXT, TEXT, max_size=2), max_size=2))),
        ground_truth=draw(TEXT),
        data_source=draw(TEXT),
    )
    completions, rewards = [], []
    for index in range(draw(st.integers(1, 3))):
        tokens = tuple(draw(TOKENS))
        completions.append(
            Completion(
                prompt_id=prompt.id,
                index=index,
                token_ids=tokens,
                logprobs=tuple(draw(NUMBER) for _ in tokens),
                finish_reason=draw(st.sampled_from(get_args(FinishReason))),
                text=draw(TEXT),
                versions=(VersionSpan(version=3, start=0, end=len(tokens)),) if tokens else (),
            )
        )
        parts = draw(st.dictionaries(TEXT, NUMBER, max_size=2))
        rewards.append(Reward(score=draw(NUMBER), accuracy=draw(NUMBER), parts=parts))
    return ScoredGroup(prompt=prompt, completions=tuple(completions), rewards=tuple(rewards))


@given(groups())
def test_a_round_trip_through_a_file(group: ScoredGroup) -> None:
    assert from_json(json.loads(json.dumps(to_json(group)))) == group
