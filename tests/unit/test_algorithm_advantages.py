"""Advantages, alpha, live groups and the redraw rule, against values computed by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import mean, stdev
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpg_megatron.algorithm.advantages import (
    DEAD_TOLERANCE,
    alpha,
    assign_advantages,
    is_live,
    live_fraction,
    normalised_rewards,
)
from gpg_megatron.config.algorithm import AlgorithmConfig
from gpg_megatron.errors import UserError
from gpg_megatron.types import Completion, Prompt, Reward, ScoredGroup, TrainSample, VersionSpan
from tests.presets import from_preset
from tests.samples import float32, int32


def group(
    scores: Sequence[float],
    accuracies: Sequence[float] | None = None,
    lengths: Sequence[int] | None = None,
    name: str = "toy/0",
    version: int = 0,
) -> ScoredGroup:
    """A scored group; accuracies default to the scores, lengths to 1."""
    accuracies = scores if accuracies is None else accuracies
    lengths = [1] * len(scores) if lengths is None else lengths
    prompt = Prompt(
        id=name, token_ids=int32((5, 6)), messages=(), ground_truth="", data_source="toy"
    )
    completions = tuple(
        Completion(
            prompt_id=name,
            index=i,
            token_ids=int32(range(10, 10 + n)),
            logprobs=float32(-0.5 for _ in range(n)),
            finish_reason="stop",
            text="",
            versions=(VersionSpan(version=version, start=0, end=n),) if n else (),
        )
        for i, n in enumerate(lengths)
    )
    rewards = tuple(
        Reward(score=s, accuracy=a, parts={}) for s, a in zip(scores, accuracies, strict=True)
    )
    return ScoredGroup(prompt=prompt, completions=completions, rewards=rewards)


def samples_of(groups: Sequence[ScoredGroup]) -> list[TrainSample]:
    """Their samples, as alpha counts them."""
    return assign_advantages(groups, AlgorithmConfig())[0]


def centred(group: ScoredGroup, **settings: Any) -> list[float]:
    """Of a batch that is one group."""
    return normalised_rewards([group], AlgorithmConfig(**settings))[0]


def advantages(groups: Sequence[ScoredGroup], **settings: Any) -> list[float]:
    samples, _ = assign_advantages(groups, AlgorithmConfig(**settings))
    return [sample.advantage for sample in samples]


LIVE = group([1.0, 0.0, 0.0, 0.0], lengths=[2, 3, 1, 4])  # 10 tokens
RIGHT = group([1.0, 1.0], lengths=[5, 5])  # 10 tokens
WRONG = group([0.0, 0.0, 0.0], lengths=[10, 20, 10])  # 40 tokens


@pytest.mark.parametrize(
    ("accuracies", "live"),
    [
        ([0.0, 1.0], True),
        ([0.0, 0.0], False),
        ([1.0, 1.0, 1.0], False),
        ([1.0], False),
        ([-1.0, 1.0], True),
        ([0.5, 0.5 + 0.5 * DEAD_TOLERANCE], False),
        ([0.5, 0.5 + 2 * DEAD_TOLERANCE], True),
    ],
)
def test_a_group_is_live_when_its_accuracies_differ(accuracies: list[float], live: bool) -> None:
    assert is_live(group(accuracies)) is live


def test_live_fraction() -> None:
    assert live_fraction([LIVE, RIGHT, WRONG, LIVE]) == 0.5
    assert live_fraction([RIGHT]) == 0.0
    assert live_fraction([]) == 0.0


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("none", 1.0),
        ("group", 9 / (9 - 5)),  # B = 4 + 2 + 3, M = 2 + 3
        ("token", 60 / 10),
        ("nonzero", 9 / 3),  # scores: 1 0 0 0, 1 1, 0 0 0
    ],
)
def test_alpha_by_hand(mode: str, expected: float) -> None:
    assert alpha(samples_of([LIVE, RIGHT, WRONG]), mode) == expected


@pytest.mark.parametrize("mode", ["none", "group", "token"])
def test_alpha_when_all_groups_are_live_and_when_none_is(mode: str) -> None:
    assert alpha(samples_of([LIVE, LIVE]), mode) == 1.0
    without = 1.0 if mode == "none" else 0.0
    assert alpha(samples_of([RIGHT, WRONG]), mode) == without
    assert alpha([], mode) == without


def test_alpha_token_without_a_token_in_live_groups() -> None:
    assert alpha(samples_of([group([1.0, 0.0], lengths=[0, 0]), RIGHT]), "token") == 0.0


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([1.0, 0.0, 0.0, 0.0], 4.0),  # 0 and 1: 1 / accuracy
        ([0.0, 0.0, 0.0, 0.0], 4.0),  # nobody: the divisor is 1
        ([1.0, 1.0, 1.0, 1.0], 1.0),
        ([1.0, -1.0, -1.0, -1.0], 1.0),  # -1 is not 0
        ([1.0, 0.1, 0.0, 0.0], 2.0),
    ],
)
def test_alpha_nonzero_counts_scores_not_right_answers(
    scores: Sequence[float], expected: float
) -> None:
    assert (
        alpha(samples_of([group(scores, accuracies=[1.0, 0.0, 0.0, 0.0])]), "nonzero") == expected
    )


@pytest.mark.parametrize(("largest", "expected"), [(0.0, 6.0), (4.0, 4.0), (9.0, 6.0)])
def test_alpha_is_limited(largest: float, expected: float) -> None:
    assert alpha(samples_of([LIVE, RIGHT, WRONG]), "token", largest) == expected
    got = advantages([LIVE, RIGHT, WRONG], alpha="token", alpha_max=largest)
    assert got[0] == 0.75 * expected


@pytest.mark.parametrize(("mode", "factor"), [("none", 1.0), ("group", 2.25), ("token", 6.0)])
def test_advantages_by_hand(mode: str, factor: float) -> None:
    expected = [0.75 * factor, *[-0.25 * factor] * 3, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert advantages([LIVE, RIGHT, WRONG], alpha=mode) == expected


def test_f_norm_std_is_the_sample_standard_deviation() -> None:
    # scores 1 0 0 0: mean 1/4, squared deviations 12/16, over G - 1 = 3: 1/4, std 1/2
    got = advantages([LIVE], f_norm="std")
    assert got == pytest.approx([1.5, -0.5, -0.5, -0.5], rel=4e-6)
    assert got[0] == 0.75 / (0.5 + 1e-6)
    assert advantages([LIVE], f_norm="std", f_norm_eps=0.5)[0] == 0.75


def test_statistics_by_hand() -> None:
    _, stats = assign_advantages([LIVE, RIGHT, WRONG], AlgorithmConfig())
    assert (stats.alpha, stats.live_fraction) == (2.25, 1 / 3)
    assert (stats.n_samples, stats.n_shaped) == (9, 0)


@pytest.mark.parametrize("mode", ["none", "group", "token"])
@pytest.mark.parametrize("f_norm", ["one", "batch-std"])
def test_all_dead_and_singleton_groups_give_exactly_zero(mode: str, f_norm: str) -> None:
    groups = [RIGHT, WRONG, group([1.0])]
    samples, stats = assign_advantages(groups, from_preset("paper", alpha=mode, f_norm=f_norm))
    assert [s.advantage for s in samples] == [0.0] * 6
    assert stats.live_fraction == 0.0
    assert stats.alpha == (1.0 if mode == "none" else 0.0)


def test_no_groups() -> None:
    samples, stats = assign_advantages([], AlgorithmConfig())
    assert (samples, stats.alpha, stats.n_samples) == ([], 0.0, 0)


def test_accuracy_decides_who_is_live_and_score_decides_the_advantage() -> None:
    all_wrong_but_shaped = group([0.1, 0.3], accuracies=[0.0, 0.0])
    shaped = group([1.2, 0.2, 0.1], accuracies=[1.0, 0.0, 0.0])
    got = advantages([all_wrong_but_shaped, shaped], alpha="none")
    assert got[:2] == [0.0, 0.0]
    assert got[2:] == pytest.approx([0.7, -0.3, -0.4])


@pytest.mark.parametrize("f_norm", ["one", "std"])
@pytest.mark.parametrize("score", [0.1, 0.7, -1e30, 1 / 3])
def test_equal_scores_in_a_live_group_give_exactly_zero(score: float, f_norm: str) -> None:
    # 0.1 + 0.1 + 0.1 is not 0.3 in floating point; the baseline has to be exact all the same
    same = group([score] * 3, accuracies=[1.0, 0.0, 0.0])
    assert advantages([same], f_norm=f_norm) == [0.0, 0.0, 0.0]


def test_a_score_at_the_mean_gives_exactly_zero() -> None:
    assert advantages([group([0.0, 0.5, 1.0])], alpha="none") == [-0.5, 0.0, 0.5]


def test_negative_and_huge_rewards() -> None:
    assert advantages([group([-1.0, 1.0, 1.0, -1.0])]) == [-1.0, 1.0, 1.0, -1.0]
    assert advantages([group([3e38, -3e38])]) == [3e38, -3e38]


def test_an_empty_response_gets_no_advantage_and_counts_for_the_baseline() -> None:
    got = advantages([group([1.0, 0.0, 0.0, 0.0], lengths=[2, 0, 1, 1])])
    assert got == [0.75, 0.0, -0.25, -0.25]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e39])
@pytest.mark.parametrize("field", ["score", "accuracy"])
def test_a_reward_that_is_no_finite_float32_is_refused(value: float, field: str) -> None:
    bad = {"score": [0.0, 1.0], "accuracy": [0.0, 1.0], field: [0.0, value]}
    groups = [LIVE, group(bad["score"], bad["accuracy"], name="toy/7")]
    with pytest.raises(UserError, match=rf"'toy/7', answer 1: {field} is .*finite") as error:
        assign_advantages(groups, AlgorithmConfig())
    assert "\n" not in str(error.value)


def test_samples_carry_their_origin() -> None:
    groups = [group([1.0, 0.0], lengths=[3, 1], name="toy/4", version=2), RIGHT]
    samples, _ = assign_advantages(groups, AlgorithmConfig())
    assert [(s.group, s.index, s.prompt_id) for s in samples] == [
        (0, 0, "toy/4"),
        (0, 1, "toy/4"),
        (1, 0, "toy/0"),
        (1, 1, "toy/0"),
    ]
    assert samples[0].prompt_token_ids is groups[0].prompt.token_ids
    assert samples[0].response_token_ids is groups[0].completions[0].token_ids
    assert samples[0].rollout_logprobs is groups[0].completions[0].logprobs


def test_the_version_is_the_oldest_span_and_an_empty_response_takes_the_newest() -> None:
    spans = (VersionSpan(version=4, start=0, end=1), VersionSpan(version=3, start=1, end=2))
    base = group([1.0, 0.0], lengths=[2, 0]).completions
    mixed = Completion(
        prompt_id="toy/0",
        index=0,
        token_ids=base[0].token_ids,
        logprobs=base[0].logprobs,
        finish_reason="stop",
        text="",
        versions=spans,
    )
    source = group([1.0, 0.0], lengths=[2, 0])
    mixed_group = ScoredGroup(
        prompt=source.prompt, completions=(mixed, base[1]), rewards=source.rewards
    )
    samples, _ = assign_advantages([mixed_group], AlgorithmConfig())
    assert [s.version for s in samples] == [3, 4]


# baselines and divisors of the methods that GPG is compared with


def test_leave_one_out_by_hand() -> None:
    # 1 0 0 0: the others' means are 0, 1/3, 1/3, 1/3
    got = centred(LIVE, baseline="leave-one-out")
    assert got == pytest.approx([1.0, -1 / 3, -1 / 3, -1 / 3])


def test_batch_mean_and_batch_std_by_hand() -> None:
    # scores 1 0 0 0, 1 1, 0 0 0: mean 3/9; squared deviations 3 * 4/9 + 6 * 1/9 = 2, over 8: 1/4
    config = AlgorithmConfig(baseline="batch-mean", f_norm="batch-std", f_norm_eps=0.0)
    got = normalised_rewards([LIVE, RIGHT, WRONG], config)
    high, low = (2 / 3) / 0.5, (-1 / 3) / 0.5
    assert got[0] == pytest.approx([high, low, low, low])
    assert got[1] == pytest.approx([high, high])
    assert got[2] == pytest.approx([low, low, low])


def test_batch_std_of_group_normalised_rewards_by_hand() -> None:
    # 0.75 and three -0.25, five 0: squares sum to 0.75, mean 0, over 8
    config = AlgorithmConfig(f_norm="batch-std", f_norm_eps=0.0)
    got = normalised_rewards([LIVE, RIGHT, WRONG], config)
    assert got[0][0] == pytest.approx(0.75 / math.sqrt(0.75 / 8))
    assert got[1] + got[2] == [0.0] * 5


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=9))
def test_leave_one_out_is_the_definition(scores: Sequence[float]) -> None:
    expected = [s - (math.fsum(scores) - s) / (len(scores) - 1) for s in scores]
    got = centred(group(scores), baseline="leave-one-out")
    assert got == pytest.approx(expected, abs=1e-9)


# who is dead


SHAPED = group([0.1, 0.3], accuracies=[0.0, 0.0])


@pytest.mark.parametrize(
    ("dead_by", "expected"), [("accuracy", [0, 0]), ("score", [-0.1, 0.1]), ("none", [-0.1, 0.1])]
)
def test_what_decides_that_a_group_is_dead(dead_by: str, expected: float) -> None:
    assert advantages([SHAPED], dead_by=dead_by, alpha="none") == pytest.approx(expected)


def test_a_part_of_the_reward_can_decide() -> None:
    base = group([0.1, 0.3], accuracies=[0.0, 1.0])
    rewards = (
        Reward(score=0.1, accuracy=0.0, parts={"format": 1.0}),
        Reward(score=0.3, accuracy=1.0, parts={"format": 1.0}),
    )
    same = ScoredGroup(prompt=base.prompt, completions=base.completions, rewards=rewards)
    assert is_live(same) and not is_live(same, "format")
    crashed = (rewards[0], Reward(score=0.0, accuracy=0.0, parts={"crash": 1.0}))
    other = ScoredGroup(prompt=base.prompt, completions=base.completions, rewards=crashed)
    assert is_live(other, "format"), "an answer without the part counts as 0"
    with pytest.raises(UserError, match=r"'fromat'.*expected accuracy, score, none, crash, format"):
        assign_advantages([same, other], AlgorithmConfig(dead_by="fromat"))


def test_none_is_dead_but_the_live_fraction_still_tells() -> None:
    samples, stats = assign_advantages(
        [SHAPED, LIVE, group([1.0])], AlgorithmConfig(dead_by="none", alpha="nonzero")
    )
    assert stats.live_fraction == 1 / 3
    assert [s.live for s in samples] == [False] * 2 + [True] * 4 + [False]
    # verl: 7 responses, 4 of them with a score other than 0; the baseline of one answer is 0
    assert samples[-1].advantage == 7 / 4
    assert stats.n_shaped == 2


def test_alpha_of_a_smaller_scope_is_left_to_the_update() -> None:
    samples, stats = assign_advantages([LIVE, RIGHT], AlgorithmConfig(alpha_scope="micro-batch"))
    assert stats.alpha == 1.0
    assert [s.advantage for s in samples] == [0.75, -0.25, -0.25, -0.25, 0.0, 0.0]
    assert [s.score for s in samples] == [1.0, 0.0, 0.0, 0.0, 1.0, 1.0]


SCORES = st.floats(min_value=-1e6, max_value=1e6)


@given(st.lists(SCORES, min_size=1, max_size=9))
def test_normalised_rewards_match_the_definition_and_sum_to_zero(scores: Sequence[float]) -> None:
    got = centred(group(scores), dead_by="none")
    mean_score = math.fsum(scores) / len(scores) if len(scores) > 1 else 0.0
    assert got == pytest.approx([s - mean_score for s in scores], abs=1e-9)
    assert len(scores) == 1 or math.fsum(got) == pytest.approx(0.0, abs=1e-8)


@given(st.lists(SCORES, min_size=2, max_size=9), st.floats(-1e3, 1e3))
def test_a_constant_added_to_all_rewards_changes_nothing(
    scores: Sequence[float], shift: float
) -> None:
    shifted = centred(group([s + shift for s in scores]))
    assert shifted == pytest.approx(centred(group(scores)), abs=1e-8)


@given(st.lists(st.integers(-1000, 1000), min_size=2, max_size=9, unique=True))
def test_std_normalised_rewards_have_unit_deviation(scores: Sequence[float]) -> None:
    got = centred(group([float(s) for s in scores]), f_norm="std")
    assert mean(got) == pytest.approx(0.0, abs=1e-9)
    assert stdev(got) == pytest.approx(1.0, rel=2e-6)


@given(
    st.lists(st.lists(st.sampled_from([0.0, 1.0]), min_size=4, max_size=4), min_size=1, max_size=8)
)
def test_group_alpha_makes_the_batch_mean_the_mean_over_live_samples(
    batch: list[list[float]],
) -> None:
    groups = [group(scores) for scores in batch]
    with_alpha, plain = advantages(groups, alpha="group"), advantages(groups, alpha="none")
    n_live = 4 * sum(map(is_live, groups))
    expected = sum(map(abs, plain)) / n_live if n_live else 0.0
    assert sum(map(abs, with_alpha)) / len(with_alpha) == pytest.approx(expected)
