"""Groups survive the way to another rank and into a checkpoint, bit by bit."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import get_args

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from gpg_megatron.loop.group_arrays import flatten, unflatten
from gpg_megatron.types import (
    Completion,
    FinishReason,
    Prompt,
    Reward,
    Routing,
    ScoredGroup,
    VersionSpan,
)
from tests.samples import float32, int32, plain, routing

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
    number = st.integers(0, 200)
    prompt_rows = routing(draw(st.lists(number, max_size=3))).prompt
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
                routing=Routing(
                    prompt=prompt_rows,
                    response=routing((), draw(st.lists(number, max_size=len(tokens)))).response,
                ),
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


def test_numbers_of_more_than_256_experts() -> None:
    """One group has none, as after a resume from a run without."""
    many = Routing(
        prompt=np.full((2, 1, 1), 300, np.uint16), response=np.full((1, 1, 1), 511, np.uint16)
    )
    group, bare = (_group(r) for r in (many, routing()))
    flat = flatten([bare, group, bare])
    assert flat.experts.dtype == np.uint16
    first, second, third = (g.completions[0].routing for g in unflatten(flat))
    assert plain(second) == plain(many)
    assert all(len(r.prompt) == len(r.response) == 0 for r in (first, third))


def test_groups_of_earlier_versions_have_no_experts() -> None:
    flat = flatten([_group(routing((1,), (2,)))])
    rows = json.loads(flat.text)
    del rows[0]["routing"], rows[0]["completions"][0]["routing"]
    (found,) = unflatten(replace(flat, text=json.dumps(rows)))
    assert len(found.completions[0].routing.response) == 0


def _group(of: Routing) -> ScoredGroup:
    """Of one answer."""
    answer = Completion(
        prompt_id="p",
        index=0,
        token_ids=int32((4,)),
        logprobs=float32((-1.0,)),
        finish_reason="stop",
        text="",
        versions=(VersionSpan(version=0, start=0, end=1),),
        routing=of,
    )
    prompt = Prompt(id="p", token_ids=int32((1, 2)), messages=(), ground_truth="", data_source="")
    reward = Reward(score=1.0, accuracy=1.0, parts={})
    return ScoredGroup(prompt=prompt, completions=(answer,), rewards=(reward,))
