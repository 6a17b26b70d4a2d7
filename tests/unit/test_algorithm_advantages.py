"""Advantages, alpha, live groups and the redraw rule, against values computed by hand."""

from __future__ import annotations

import math
from statistics import mean, stdev

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpg_megatron.algorithm.advantages import (
    ACCURACY_TOLERANCE,
    STD_EPS,
    alpha,
    assign_advantages,
    centred_rewards,
    is_live,
    live_fraction,
    needs_redraw,
)
from gpg_megatron.config import AlgorithmConfig
from gpg_megatron.errors import UserError
from gpg_megatron.types import Completion, Prompt, Reward, ScoredGroup, VersionSpan


def group(scores, accuracies=None, lengths=None, name="toy/0", version=0):
    """A scored group; accuracies default to the scores, lengths to 1."""
    accuracies = scores if accuracies is None else accuracies
    lengths = [1] * len(scores) if lengths is None else lengths
    prompt = Prompt(id=name, token_ids=(5, 6), messages=(), ground_truth="", data_source="toy")
    completions = tuple(
        Completion(
            prompt_id=name,
            index=i,
            token_ids=tuple(range(10, 10 + n)),
            logprobs=tuple(-0.5 for _ in range(n)),
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


def advantages(groups, **settings):
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
        ([0.5, 0.5 + 0.5 * ACCURACY_TOLERANCE], False),
        ([0.5, 0.5 + 2 * ACCURACY_TOLERANCE], True),
    ],
)
def test_a_group_is_live_when_its_accuracies_differ(accuracies, live):
    assert is_live(group(accuracies)) is live


def test_live_fraction():
    assert live_fraction([LIVE, RIGHT, WRONG, LIVE]) == 0.5
    assert live_fraction([RIGHT]) == 0.0
    assert live_fraction([]) == 0.0


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("none", 1.0),
        ("group", 9 / (9 - 5)),  # B = 4 + 2 + 3, M = 2 + 3
        ("token", 60 / 10),
    ],
)
def test_alpha_by_hand(mode, expected):
    assert alpha([LIVE, RIGHT, WRONG], mode) == expected


@pytest.mark.parametrize("mode", ["none", "group", "token"])
def test_alpha_is_one_when_all_groups_are_live_and_zero_when_none_is(mode):
    assert alpha([LIVE, LIVE], mode) == 1.0
    assert alpha([RIGHT, WRONG], mode) == 0.0
    assert alpha([], mode) == 0.0


def test_alpha_token_without_a_token_in_live_groups():
    assert alpha([group([1.0, 0.0], lengths=[0, 0]), RIGHT], "token") == 0.0


@pytest.mark.parametrize(("mode", "factor"), [("none", 1.0), ("group", 2.25), ("token", 6.0)])
def test_advantages_by_hand(mode, factor):
    expected = [0.75 * factor, *[-0.25 * factor] * 3, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert advantages([LIVE, RIGHT, WRONG], alpha=mode) == expected


def test_f_norm_std_is_the_sample_standard_deviation():
    # scores 1 0 0 0: mean 1/4, squared deviations 12/16, over G - 1 = 3: 1/4, std 1/2
    got = advantages([LIVE], f_norm="std")
    assert got == pytest.approx([1.5, -0.5, -0.5, -0.5], rel=4e-6)
    assert got[0] == 0.75 / (0.5 + STD_EPS)


def test_statistics_by_hand():
    _, stats = assign_advantages([LIVE, RIGHT, WRONG], AlgorithmConfig())
    assert (stats.alpha, stats.live_fraction) == (2.25, 1 / 3)
    assert (stats.n_groups, stats.n_live_groups) == (3, 1)
    assert (stats.n_samples, stats.n_dead_samples) == (9, 5)


@pytest.mark.parametrize("mode", ["none", "group", "token"])
@pytest.mark.parametrize("f_norm", ["one", "std"])
def test_all_dead_and_singleton_groups_give_exactly_zero(mode, f_norm):
    groups = [RIGHT, WRONG, group([1.0])]
    samples, stats = assign_advantages(groups, AlgorithmConfig(alpha=mode, f_norm=f_norm))
    assert [s.advantage for s in samples] == [0.0] * 6
    assert (stats.alpha, stats.n_dead_samples, stats.live_fraction) == (0.0, 6, 0.0)


def test_no_groups():
    samples, stats = assign_advantages([], AlgorithmConfig())
    assert (samples, stats.alpha, stats.n_samples) == ([], 0.0, 0)


def test_accuracy_decides_who_is_live_and_score_decides_the_advantage():
    all_wrong_but_shaped = group([0.1, 0.3], accuracies=[0.0, 0.0])
    shaped = group([1.2, 0.2, 0.1], accuracies=[1.0, 0.0, 0.0])
    got = advantages([all_wrong_but_shaped, shaped], alpha="none")
    assert got[:2] == [0.0, 0.0]
    assert got[2:] == pytest.approx([0.7, -0.3, -0.4])


@pytest.mark.parametrize("f_norm", ["one", "std"])
@pytest.mark.parametrize("score", [0.1, 0.7, -1e30, 1 / 3])
def test_equal_scores_in_a_live_group_give_exactly_zero(score, f_norm):
    # 0.1 + 0.1 + 0.1 is not 0.3 in floating point; the baseline has to be exact all the same
    same = group([score] * 3, accuracies=[1.0, 0.0, 0.0])
    assert advantages([same], f_norm=f_norm) == [0.0, 0.0, 0.0]


def test_a_score_at_the_mean_gives_exactly_zero():
    assert advantages([group([0.0, 0.5, 1.0])], alpha="none") == [-0.5, 0.0, 0.5]


def test_negative_and_huge_rewards():
    assert advantages([group([-1.0, 1.0, 1.0, -1.0])]) == [-1.0, 1.0, 1.0, -1.0]
    assert advantages([group([3e38, -3e38])]) == [3e38, -3e38]


def test_an_empty_response_gets_no_advantage_and_counts_for_the_baseline():
    got = advantages([group([1.0, 0.0, 0.0, 0.0], lengths=[2, 0, 1, 1])])
    assert got == [0.75, 0.0, -0.25, -0.25]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e39])
@pytest.mark.parametrize("field", ["score", "accuracy"])
def test_a_reward_that_is_no_finite_float32_is_refused(value, field):
    bad = {"score": [0.0, 1.0], "accuracy": [0.0, 1.0], field: [0.0, value]}
    groups = [LIVE, group(bad["score"], bad["accuracy"], name="toy/7")]
    with pytest.raises(UserError, match=rf"'toy/7', answer 1: {field} is .*finite") as error:
        assign_advantages(groups, AlgorithmConfig())
    assert "\n" not in str(error.value)


def test_samples_carry_their_origin():
    groups = [group([1.0, 0.0], lengths=[3, 1], name="toy/4", version=2), RIGHT]
    samples, _ = assign_advantages(groups, AlgorithmConfig())
    assert [(s.group, s.index, s.prompt_id) for s in samples] == [
        (0, 0, "toy/4"),
        (0, 1, "toy/4"),
        (1, 0, "toy/0"),
        (1, 1, "toy/0"),
    ]
    assert samples[0].prompt_token_ids == (5, 6)
    assert samples[0].response_token_ids == (10, 11, 12)
    assert samples[0].rollout_logprobs == (-0.5, -0.5, -0.5)


def test_the_version_is_the_oldest_span_and_an_empty_response_takes_the_newest():
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


@pytest.mark.parametrize(
    ("groups", "beta_th", "rounds_done", "expected"),
    [
        ([RIGHT] * 10, 0.0, 0, False),  # off
        ([LIVE] * 5 + [RIGHT] * 5, 0.6, 0, True),  # 5 of 10 < 6
        ([LIVE] * 6 + [RIGHT] * 4, 0.6, 0, False),  # met exactly
        ([LIVE] * 5 + [RIGHT] * 5 + [LIVE] + [RIGHT] * 9, 0.6, 1, False),  # accumulated: 6
        ([RIGHT] * 30, 0.6, 2, True),
        ([RIGHT] * 40, 0.6, 3, False),  # rounds used up
        ([LIVE] * 10, 1.0, 0, False),
    ],
)
def test_redraw_rule(groups, beta_th, rounds_done, expected):
    config = AlgorithmConfig(beta_th=beta_th, max_redraws=3)
    assert needs_redraw(groups, config, rounds_done, batch_size=10) is expected


SCORES = st.floats(min_value=-1e6, max_value=1e6)


@given(st.lists(SCORES, min_size=1, max_size=9))
def test_centred_rewards_match_the_definition_and_sum_to_zero(scores):
    centred = centred_rewards(group(scores), "one")
    assert centred == pytest.approx([s - math.fsum(scores) / len(scores) for s in scores], abs=1e-9)
    assert math.fsum(centred) == pytest.approx(0.0, abs=1e-8)


@given(st.lists(SCORES, min_size=2, max_size=9), st.floats(-1e3, 1e3))
def test_a_constant_added_to_all_rewards_changes_nothing(scores, shift):
    shifted = centred_rewards(group([s + shift for s in scores]), "one")
    assert shifted == pytest.approx(centred_rewards(group(scores), "one"), abs=1e-8)


@given(st.lists(st.integers(-1000, 1000), min_size=2, max_size=9, unique=True))
def test_std_normalised_rewards_have_unit_deviation(scores):
    centred = centred_rewards(group([float(s) for s in scores]), "std")
    assert mean(centred) == pytest.approx(0.0, abs=1e-9)
    assert stdev(centred) == pytest.approx(1.0, rel=2e-6)


@given(
    st.lists(st.lists(st.sampled_from([0.0, 1.0]), min_size=4, max_size=4), min_size=1, max_size=8)
)
def test_group_alpha_makes_the_batch_mean_the_mean_over_live_samples(batch):
    groups = [group(scores) for scores in batch]
    with_alpha, plain = advantages(groups, alpha="group"), advantages(groups, alpha="none")
    n_live = 4 * sum(map(is_live, groups))
    expected = sum(map(abs, plain)) / n_live if n_live else 0.0
    assert sum(map(abs, with_alpha)) / len(with_alpha) == pytest.approx(expected)
