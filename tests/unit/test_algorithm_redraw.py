"""beta_th: when more prompts are drawn, what is trained on, and what is kept for the next step."""

from __future__ import annotations

import random
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpg_megatron.algorithm.advantages import assign_advantages, is_live
from gpg_megatron.algorithm.aggregation import aggregation_weights
from gpg_megatron.algorithm.redraw import RedrawsExhausted, Selection, select
from gpg_megatron.config.algorithm import AlgorithmConfig
from gpg_megatron.types import Completion, Prompt, Reward, ScoredGroup, VersionSpan
from tests.samples import float32, int32
from tests.unit.draws import batches


def group(live: bool, number: int = 0, version: int = 0) -> ScoredGroup:
    accuracies = [1.0, 0.0] if live else [0.0, 0.0]
    name = f"toy/{number}"
    completions = tuple(
        Completion(
            prompt_id=name,
            index=i,
            token_ids=int32((7,)),
            logprobs=float32((-1.0,)),
            finish_reason="stop",
            text="",
            versions=(VersionSpan(version=version, start=0, end=1),),
        )
        for i in range(2)
    )
    return ScoredGroup(
        prompt=Prompt(
            id=name, token_ids=int32((1,)), messages=(), ground_truth="", data_source="toy"
        ),
        completions=completions,
        rewards=tuple(Reward(score=a, accuracy=a, parts={}) for a in accuracies),
    )


def numbered(pattern: str) -> list[ScoredGroup]:
    """One group for each letter: L is live, anything else is dead."""
    return [group(letter == "L", number) for number, letter in enumerate(pattern)]


def chosen(
    pattern: str, batch_size: int, **settings: Any
) -> tuple[list[int], list[int], Selection]:
    """(numbers of the groups to train on, numbers of those carried over, the selection)."""
    selection = select(numbered(pattern), AlgorithmConfig(**settings), batch_size=batch_size)
    train, carried = (
        [int(g.prompt.id.removeprefix("toy/")) for g in part]
        for part in (selection.groups, selection.carried)
    )
    return train, carried, selection


def test_without_a_rule_everything_is_trained_on() -> None:
    train, carried, selection = chosen("LdLd", 4)
    assert (train, carried) == ([0, 1, 2, 3], [])
    assert not selection.exhausted and not selection.skipped and selection.n_filtered == 0


def test_after_redraws_the_batch_is_one_draw_again() -> None:
    train, carried, selection = chosen("dddLLLdd", 4, beta_th=0.6)
    assert (train, carried) == ([0, 3, 4, 5], [])
    assert not selection.exhausted and selection.n_filtered == 4


def test_alpha_of_three_draws_is_that_of_one_and_each_answer_weighs_the_same() -> None:
    """Draws of 10, 2 live in each: counted over all 30 groups alpha was 5; over one draw it is
    10 / 6, at most 1 / beta_th. Per answer alpha / questions is the same."""
    settings = AlgorithmConfig(beta_th=0.6)
    drawn = numbered("LLdddddddd" * 3)
    selection = select(drawn, settings, batch_size=10)
    for groups, expected in ((drawn, 5.0), (selection.groups, 10 / 6)):
        samples, stats = assign_advantages(groups, settings)
        assert stats.alpha == pytest.approx(expected)
        weights = aggregation_weights(samples, "group-token-mean", 8)
        live = [abs(s.advantage) * w for s, w in zip(samples, weights, strict=True) if s.live]
        # advantage alpha / 2, weight 1 / (questions * 2 tokens of the group)
        assert live == pytest.approx([0.041667] * 12, rel=1e-4)


def test_live_groups_beyond_the_batch_size_are_carried_over() -> None:
    train, carried, _ = chosen("LLLdLLdL", 4, beta_th=1.0)
    assert train == [0, 1, 2, 4]
    assert carried == [5, 7]


def test_a_filter_leaves_the_dead_out() -> None:
    train, carried, selection = chosen("LdLdLLLd", 4, filter_groups=True)
    assert (train, carried) == ([0, 2, 4, 5], [6])
    assert selection.n_filtered == 3


def test_a_filter_without_a_live_group_keeps_the_dead_and_so_the_step_has_no_gradient() -> None:
    train, carried, selection = chosen("dd", 2, filter_groups=True)
    assert (train, carried, selection.n_filtered) == ([0, 1], [], 0)


@pytest.mark.parametrize("rule", [{"beta_th": 0.5}, {"filter_groups": True}])
def test_what_happens_when_no_draw_is_left(rule: dict[str, Any]) -> None:
    pattern, size = "Lddddddd", 4
    train, carried, selection = chosen(pattern, size, **rule, on_exhausted="train")
    assert selection.exhausted and not selection.skipped
    assert 0 in train and carried == []
    _, carried, selection = chosen(pattern, size, **rule, on_exhausted="skip")
    assert selection.exhausted and selection.skipped
    assert carried == [0], "kept for the next step"
    with pytest.raises(RedrawsExhausted, match="1 groups are live of the") as error:
        chosen(pattern, size, **rule, on_exhausted="error")
    assert "\n" not in str(error.value)


@given(
    pattern=st.text("Ld", min_size=1, max_size=24),
    batch_size=st.integers(1, 8),
    beta_th=st.sampled_from([0.0, 0.3, 0.6, 1.0]),
    filter_groups=st.booleans(),
    on_exhausted=st.sampled_from(["train", "skip"]),
)
def test_no_live_group_is_lost_or_trained_on_twice(
    pattern: str,
    batch_size: int,
    beta_th: float,
    filter_groups: bool,
    on_exhausted: Literal["train", "skip"],
) -> None:
    groups = numbered(pattern)
    config = AlgorithmConfig(
        beta_th=0.0 if filter_groups else beta_th,
        filter_groups=filter_groups,
        on_exhausted=on_exhausted,
    )
    selection = select(groups, config, batch_size=batch_size)
    trained = [] if selection.skipped else list(selection.groups)
    seen = [id(g) for g in (*trained, *selection.carried) if is_live(g)]
    assert sorted(seen) == sorted(id(g) for g in groups if is_live(g))
    assert all(map(is_live, selection.carried))
    assert len(trained) <= batch_size
    if trained and not filter_groups:
        assert len(trained) == min(batch_size, len(groups))
    assert len(groups) == len(selection.groups) + selection.n_filtered + (
        0 if selection.skipped else len(selection.carried)
    )


@settings(max_examples=30)
@given(
    share=st.floats(0.0, 1.0),
    beta_th=st.sampled_from([0.3, 0.6, 1.0]),
    seed=st.randoms(use_true_random=False),
    on_exhausted=st.sampled_from(["train", "skip"]),
)
def test_the_groups_carried_over_always_leave_room_for_a_new_prompt(
    share: float, beta_th: float, seed: random.Random, on_exhausted: Literal["train", "skip"]
) -> None:
    """Over many steps less than a batch is carried, and redraws are whole batches."""
    config = AlgorithmConfig(beta_th=beta_th, max_redraws=2, on_exhausted=on_exhausted)
    size, live_out, n_carried = 6, 0, 0
    made: list[ScoredGroup] = []

    def new() -> ScoredGroup:
        made.append(group(seed.random() < share))
        return made[-1]

    for selection, draws in batches(config, size=size, n=20, new=new):
        assert draws[0] == size - n_carried >= 1
        assert draws[1:] == [size] * (len(draws) - 1) and len(draws) <= 3
        n_carried = len(selection.carried)
        live_out += 0 if selection.skipped else sum(map(is_live, selection.groups))
    assert sum(map(is_live, made)) == live_out + n_carried
