"""Batching: layout never changes the loss, nothing is lost or computed twice, ranks agree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import get_args, get_type_hints

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpg_megatron.algorithm.advantages import assign_advantages
from gpg_megatron.algorithm.aggregation import aggregation_weights
from gpg_megatron.algorithm.loss import gpg_loss
from gpg_megatron.algorithm.micro_steps import micro_steps
from gpg_megatron.batching.updates import (
    BatchPlan,
    make_batches,
    make_update,
    pack,
    split_updates,
)
from gpg_megatron.config.algorithm import AlgorithmConfig
from gpg_megatron.model.flops import TokenCosts
from gpg_megatron.types import (
    NO_ROUTING,
    Completion,
    MicroBatch,
    Prompt,
    Reward,
    ScoredGroup,
    TrainBatch,
    TrainSample,
)
from tests.presets import from_preset
from tests.samples import float32, int32, routing, train_sample
from tests.unit.amap import Answer, amap_loss

COSTS = TokenCosts(per_token=1.0, per_loss_token=0.5, per_pair=0.01)
MODES = get_args(get_type_hints(AlgorithmConfig)["loss_aggregation"])
MAX_RESPONSE = 12


def plan(
    max_tokens: int = 100,
    mode: str = "group-token-mean",
    *,
    algorithm: AlgorithmConfig | None = None,
    n_updates: int = 1,
    dp_rank: int = 0,
    dp_size: int = 1,
    share: bool = True,
) -> BatchPlan:
    return BatchPlan(
        algorithm=algorithm or from_preset("paper", loss_aggregation=mode),
        n_updates=n_updates,
        max_tokens=max_tokens,
        max_response_length=MAX_RESPONSE,
        dp_rank=dp_rank,
        dp_size=dp_size,
        costs=COSTS,
        share_prompts=share,
    )


def update(
    samples: Sequence[TrainSample],
    dp_size: int,
    max_tokens: int = 16,
    mode: str = "group-token-mean",
    share: bool = True,
) -> list[TrainBatch]:
    """The TrainBatch of every rank."""
    return [
        make_update(samples, plan(max_tokens, mode, dp_rank=rank, dp_size=dp_size, share=share))
        for rank in range(dp_size)
    ]


@st.composite
def rollout_batches(draw: st.DrawFn, max_groups: int = 5) -> list[TrainSample]:
    """Groups of 1-4 samples with distinct token ids but for the prompt, some without gradient,
    some empty."""
    samples: list[TrainSample] = []
    for group in range(draw(st.integers(1, max_groups))):
        n_prompt = draw(st.integers(1, 5))
        for index in range(draw(st.integers(1, 4))):
            n_response = draw(st.integers(0, MAX_RESPONSE))
            first = 1000 * (len(samples) + 1)
            samples.append(
                train_sample(
                    range(100 * group, 100 * group + n_prompt),
                    range(first, first + n_response),
                    group=group,
                    index=index,
                    advantage=draw(st.sampled_from([0.0, 0.0, 1.0, -0.5, 2.25])),
                )
            )
    return samples


def carries_gradient(s: TrainSample) -> bool:
    return s.advantage != 0.0 and len(s.response_token_ids) > 0


def token_logprob(token: int) -> float:
    """A made-up log-prob of each token; the packed and the direct loss both use it."""
    return -0.1 - (token * 2654435761 % 1009) / 100.0


def cells_of(samples: Sequence[TrainSample], dp_size: int, max_tokens: int) -> list[list[int]]:
    """The micro-batches of all ranks if every sample were computed."""
    return [cell for step in micro_steps(samples, dp_size, max_tokens) for cell in step]


def direct_loss(
    samples: Sequence[TrainSample], mode: str, dp_size: int = 1, max_tokens: int = 100
) -> float:
    """-sum logprob * A * w sample by sample, dead ones included, in float64. dp_size and
    max_tokens matter to micro-batch-token-mean only."""
    cells = cells_of(samples, dp_size, max_tokens)
    weights = aggregation_weights(samples, mode, MAX_RESPONSE, cells)
    return -sum(
        w * s.advantage * sum(token_logprob(t) for t in s.response_token_ids.tolist())
        for s, w in zip(samples, weights, strict=True)
    )


def micro_batch_loss(mb: MicroBatch) -> float:
    # advantages and weights are 0 outside the mask
    logprobs = [token_logprob(label) for label in mb.labels_T.tolist()]
    return gpg_loss(
        torch.tensor(logprobs, dtype=torch.float64),
        mb.advantages_T.double(),
        mb.weights_T.double(),
    ).item()


def packed_loss(batches: Sequence[TrainBatch]) -> float:
    """The loss of a step from its parts: a plain sum over ranks and micro-batches."""
    return sum(micro_batch_loss(mb) for batch in batches for mb in batch.micro_batches)


def sequences(mb: MicroBatch) -> list[tuple[int, ...]]:
    """The token ids of each packed sequence, put together where they share their prompt."""
    ends, ids, labels = mb.cu_seqlens_S1.tolist(), mb.input_ids_T.tolist(), mb.labels_T.tolist()
    segments = list(zip(ends[:-1], ends[1:], strict=True))
    prompts = mb.prompt_S.tolist()
    found = []
    for number, ((start, end), prompt) in enumerate(zip(segments, prompts, strict=True)):
        if prompt >= 0:
            found.append((*ids[slice(*segments[prompt])], *ids[start:end], labels[end - 1]))
        elif number not in prompts:
            found.append(tuple(ids[start:end]))
    return found


@given(rollout_batches(), st.booleans())
def test_the_mask_marks_exactly_the_response_tokens(
    samples: Sequence[TrainSample], share: bool
) -> None:
    mb = pack(samples, [1.0] * len(samples), share_prompts=share)
    whole = [(*s.prompt_token_ids, *s.response_token_ids) for s in samples]
    assert sequences(mb) == whole
    labels = mb.labels_T[mb.loss_mask_T].tolist()
    assert labels == [token for s in samples for token in s.response_token_ids]
    logprobs = mb.rollout_logprobs_T[mb.loss_mask_T].tolist()
    assert logprobs == [value for s in samples for value in s.rollout_logprobs]
    outside = ~mb.loss_mask_T
    for tensor in (mb.advantages_T, mb.weights_T, mb.rollout_logprobs_T):
        assert not tensor[outside].any()


# the invariants of one update

UPDATES = {
    "samples": rollout_batches(),
    "dp_size": st.integers(1, 5),
    "max_tokens": st.integers(1, 60),
    "share": st.booleans(),
}


@pytest.mark.parametrize("mode", MODES)
@given(**UPDATES)
@settings(max_examples=50)
def test_loss_does_not_depend_on_layout(
    mode: str, samples: Sequence[TrainSample], dp_size: int, max_tokens: int, share: bool
) -> None:
    expected = direct_loss(samples, mode, dp_size, max_tokens)
    got = packed_loss(update(samples, dp_size, max_tokens, mode, share))
    # the weights are float32 in the packed form
    assert got == pytest.approx(expected, rel=1e-6, abs=1e-5)


@pytest.mark.parametrize("mode", MODES)
@given(samples=rollout_batches())
@settings(max_examples=50)
def test_dropping_dead_samples_does_not_change_the_loss(
    mode: str, samples: Sequence[TrainSample]
) -> None:
    weights = aggregation_weights(samples, mode, MAX_RESPONSE, cells_of(samples, 2, 30))
    everything = micro_batch_loss(pack(samples, weights))
    assert packed_loss(update(samples, 2, 30, mode)) == pytest.approx(everything, abs=1e-9)


@given(**UPDATES)
@settings(max_examples=50)
def test_every_live_sample_is_packed_exactly_once(
    samples: Sequence[TrainSample], dp_size: int, max_tokens: int, share: bool
) -> None:
    batches = update(samples, dp_size, max_tokens, share=share)
    packed = [
        s
        for batch in batches
        for mb in batch.micro_batches
        if mb.loss_mask_T.any()
        for s in sequences(mb)
    ]
    live = [(*s.prompt_token_ids, *s.response_token_ids) for s in samples if carries_gradient(s)]
    assert Counter(packed) == Counter(live)


@given(**UPDATES)
@settings(max_examples=50)
def test_ranks_match_and_stay_within_the_budget(
    samples: Sequence[TrainSample], dp_size: int, max_tokens: int, share: bool
) -> None:
    batches = update(samples, dp_size, max_tokens, share=share)
    counts = {len(batch.micro_batches) for batch in batches}
    assert len(counts) == 1
    assert (counts == {0}) == (not any(map(carries_gradient, samples)))
    for batch in batches:
        for mb in batch.micro_batches:
            assert mb.input_ids_T.numel() <= max_tokens or len(sequences(mb)) == 1
            assert mb.input_ids_T.numel() == 1 or mb.loss_mask_T.any()


@given(**UPDATES)
@settings(max_examples=50)
def test_counts(samples: Sequence[TrainSample], dp_size: int, max_tokens: int, share: bool) -> None:
    batches = update(samples, dp_size, max_tokens, share=share)
    micro_batches = [mb for batch in batches for mb in batch.micro_batches]
    computed = sum(mb.input_ids_T.numel() for mb in micro_batches)
    fillers = sum(not mb.loss_mask_T.any() for mb in micro_batches)
    total, live = (
        sum(len(s.prompt_token_ids) + len(s.response_token_ids) for s in chosen)
        for chosen in (samples, filter(carries_gradient, samples))
    )
    for batch in batches:
        assert batch.n_computed_tokens == computed
        assert batch.n_skipped_tokens == total - live
        assert batch.n_shared_tokens == live - (computed - fillers)
        assert batch.n_shared_tokens == 0 or share


@given(**UPDATES)
@settings(max_examples=50)
def test_the_order_of_the_samples_within_a_rollout_batch_does_not_matter(
    samples: Sequence[TrainSample], dp_size: int, max_tokens: int, share: bool
) -> None:
    for rank in range(dp_size):
        mine = plan(max_tokens, dp_rank=rank, dp_size=dp_size, share=share)
        forward, backward = (make_batches(x, mine) for x in (samples, samples[::-1]))
        for a, b in zip(forward, backward, strict=True):
            for x, y in zip(a.micro_batches, b.micro_batches, strict=True):
                assert torch.equal(x.input_ids_T, y.input_ids_T)
                assert torch.equal(x.weights_T, y.weights_T)


# fillers and skipped steps


def test_more_ranks_than_samples_gives_fillers_that_carry_nothing() -> None:
    batches = update(
        [train_sample(response=(3, 4, 5)), train_sample(index=1, advantage=0.0)], dp_size=3
    )
    assert [len(batch.micro_batches) for batch in batches] == [1, 1, 1]
    assert batches[0].micro_batches[0].loss_mask_T.sum() == 3
    for batch in batches[1:]:
        (filler,) = batch.micro_batches
        assert filler.input_ids_T.tolist() == [1]
        assert filler.cu_seqlens_S1.tolist() == [0, 1]
        assert not filler.loss_mask_T.any()
        assert not filler.weights_T.any() and not filler.advantages_T.any()
    assert batches[0].n_computed_tokens == 5 + 2
    assert batches[0].n_skipped_tokens == 4


def test_micro_batches_are_packed_when_they_are_asked_for() -> None:
    (batch,) = update([train_sample(index=i, response=(3, 4, 5)) for i in range(6)], 1, 10)
    rows = batch.micro_batches
    assert len(rows) == 3
    assert rows[0] is not rows[0], "nobody keeps it"
    assert all(torch.equal(x.labels_T, y.labels_T) for x, y in zip(rows, rows, strict=True))


def test_no_live_sample_means_no_micro_batch_on_any_rank() -> None:
    dead = [train_sample(advantage=0.0), train_sample(index=1, response=(), advantage=3.0)]
    for batch in update(dead, dp_size=2):
        assert not len(batch.micro_batches)
        assert (batch.n_computed_tokens, batch.n_skipped_tokens) == (0, 6)


# updates


def test_updates_are_runs_of_whole_groups() -> None:
    samples = [train_sample(group=group, index=index) for group in range(4) for index in range(2)]
    batches = split_updates(samples, 2)
    assert [[(s.group, s.index) for s in batch] for batch in batches] == [
        [(0, 0), (0, 1), (1, 0), (1, 1)],
        [(2, 0), (2, 1), (3, 0), (3, 1)],
    ]


@pytest.mark.parametrize(
    ("n_groups", "sizes"), [(8, [4, 4]), (9, [5, 4]), (16, [8, 8]), (3, [2, 1]), (1, [1]), (0, [])]
)
def test_the_number_of_updates_stays_when_redraws_change_the_number_of_groups(
    n_groups: int, sizes: list[int]
) -> None:
    samples = [train_sample(group=group) for group in range(n_groups)]
    assert list(map(len, split_updates(samples, 2))) == sizes
    assert [
        len(sequences(batch.micro_batches[0])) for batch in make_batches(samples, plan(n_updates=2))
    ] == sizes


@pytest.mark.parametrize("mode", MODES)
def test_denominators_are_those_of_the_update_not_of_the_rollout_batch(mode: str) -> None:
    samples = [
        train_sample(group=0, index=0, response=(3, 4, 5)),
        train_sample(group=0, index=1, response=(3,), advantage=-1.0),
        train_sample(group=1, index=0, response=(3, 4)),
        train_sample(group=1, index=1, response=(3, 4), advantage=0.0),
    ]
    first, second = make_batches(samples, plan(100, mode, n_updates=2))
    assert packed_loss([first]) == pytest.approx(direct_loss(samples[:2], mode), abs=1e-6)
    assert packed_loss([second]) == pytest.approx(direct_loss(samples[2:], mode), abs=1e-6)


def test_token_weights_by_hand_with_a_dead_sample_in_the_denominator() -> None:
    samples = [
        train_sample(group=0, index=0, response=(3, 4, 5)),
        train_sample(group=0, index=1, response=(3,), advantage=-1.0),
        train_sample(group=1, index=0, response=(3, 4, 5, 6), advantage=0.0),
    ]
    (batch,) = make_batches(samples, plan(100, "token-mean"))
    (mb,) = batch.micro_batches
    # the prompt, then both responses
    assert mb.weights_T.tolist() == [0, 0.125, 0.125, 0.125, 0.125]


def test_a_rank_outside_the_grid_is_a_programming_error() -> None:
    with pytest.raises(AssertionError):
        plan(dp_rank=2, dp_size=2)


# alpha over less than the rollout batch, and the samples that a KL or entropy term needs


def toy_group(accuracies: Sequence[float], lengths: Sequence[int], number: int = 0) -> ScoredGroup:
    prompt = Prompt(
        id=f"toy/{number}", token_ids=int32((1, 2)), messages=(), ground_truth="", data_source="toy"
    )
    completions = tuple(
        Completion(
            prompt_id=prompt.id,
            index=i,
            token_ids=int32(range(100 * number + 10 * i, 100 * number + 10 * i + n)),
            logprobs=float32((-0.5,) * n),
            finish_reason="stop",
            text="",
            versions=(),
        )
        for i, n in enumerate(lengths)
    )
    rewards = tuple(Reward(score=a, accuracy=a, parts={}) for a in accuracies)
    return ScoredGroup(prompt=prompt, completions=completions, rewards=rewards)


def ranks_of(
    groups: Sequence[ScoredGroup],
    algorithm: AlgorithmConfig,
    max_tokens: int = 100,
    *,
    dp_size: int = 1,
    n_updates: int = 1,
    skipped: bool = False,
) -> list[list[TrainBatch]]:
    """The batches of every rank."""
    samples, _ = assign_advantages(groups, algorithm)
    plans = [
        plan(max_tokens, algorithm=algorithm, n_updates=n_updates, dp_rank=rank, dp_size=dp_size)
        for rank in range(dp_size)
    ]
    return [make_batches(samples, mine, skipped=skipped) for mine in plans]


def test_alpha_of_a_mini_batch_by_hand() -> None:
    groups = [toy_group(r, [1, 1], i) for i, r in enumerate([(1, 0), (0, 0), (1, 0), (0, 1)])]
    algorithm = AlgorithmConfig(alpha_scope="mini-batch", loss_aggregation="token-mean")
    (batches,) = ranks_of(groups, algorithm, n_updates=2)
    assert [batch.alpha for batch in batches] == [2.0, 1.0]
    sizes = [{x for x in b.micro_batches[0].advantages_T.tolist() if x} for b in batches]
    assert sizes == [{1.0, -1.0}, {0.5, -0.5}]


def test_amap_by_hand() -> None:
    """Two ranks with micro-batches of at most 8 tokens: 16 in a micro-step.

    Prompts have 2 tokens. Group 0 (10 tokens, live) and group 1 (6 tokens, dead) are the first
    micro-step, group 2 (15 tokens, live) the second. Response tokens: rank 0 has 4 + 2 and then
    6, rank 1 has 1 + 1 of the dead group and then 5. So there are four micro-batches.
    """
    groups = [
        toy_group((1, 0), (4, 2)),
        toy_group((0, 0), (1, 1), number=1),
        toy_group((0, 1), (6, 5), number=2),
    ]
    algorithm = from_preset("amap")
    samples, stats = assign_advantages(groups, algorithm)
    assert stats.alpha == 1.0
    assert micro_steps(samples, 2, 8) == [[[0, 1], [2, 3]], [[4], [5]]]
    ranks = ranks_of(groups, algorithm, 8, dp_size=2)
    # One of two groups is live in the first micro-step, the only one in the second.
    assert [batch.alpha for (batch,) in ranks] == [1.5, 1.5]
    assert {batch.n_skipped_tokens for (batch,) in ranks} == {6}, "counted, not computed"
    packed = [row for (batch,) in ranks for mb in batch.micro_batches for row in tokens_of(mb)]
    assert {(n, a, round(1 / w, 4)) for n, a, w in packed} == {
        (4, 1.0, 24.0),
        (2, -1.0, 24.0),
        (6, -0.5, 24.0),
        (5, 0.5, 20.0),
    }


@given(rollout_batches(), st.integers(1, 5), st.integers(1, 60))
def test_micro_steps_are_whole_groups_within_the_budget(
    samples: Sequence[TrainSample], dp_size: int, max_tokens: int
) -> None:
    steps = micro_steps(samples, dp_size, max_tokens)
    assert steps == micro_steps(samples, dp_size, max_tokens)
    flat = [[i for cell in step for i in cell] for step in steps]
    assert [i for step in flat for i in step] == list(range(len(samples)))
    used = [
        sum(len(samples[i].prompt_token_ids) + len(samples[i].response_token_ids) for i in step)
        for step in flat
    ]
    for number, (step, tokens) in enumerate(zip(flat, used, strict=True)):
        members = {samples[i].group for i in step}
        others = {samples[i].group for k, x in enumerate(flat) if k != number for i in x}
        assert not members & others
        assert tokens <= dp_size * max_tokens or len(members) == 1
    for cells in steps:
        counts = [len(cell) for cell in cells]
        assert len(counts) == dp_size and max(counts) - min(counts) <= 1
        assert counts == sorted(counts, reverse=True)


def tokens_of(mb: MicroBatch) -> list[tuple[int, float, float]]:
    """(response length, advantage, weight) of each sequence."""
    mask = mb.loss_mask_T
    columns = (mb.responses_T, mb.advantages_T, mb.weights_T)
    rows = list(zip(*(column[mask].tolist() for column in columns), strict=True))
    return [(rows.count(row), row[1], row[2]) for row in dict.fromkeys(rows)]


@given(samples=rollout_batches(), n_ranks=st.integers(1, 4), room=st.integers(1, 60))
@settings(max_examples=50)
def test_amap_is_its_definition(samples: Sequence[TrainSample], n_ranks: int, room: int) -> None:
    """The plain sum over what is packed is the mean over micro-batches."""
    samples = [replace(s, live=s.advantage != 0.0) for s in samples]
    groups: dict[int, list[Answer]] = {}
    for s in samples:
        answer = Answer(
            n_prompt=len(s.prompt_token_ids),
            logprobs=tuple(map(token_logprob, s.response_token_ids.tolist())),
            advantage=s.advantage,
            live=s.live,
        )
        groups.setdefault(s.group, []).append(answer)
    expected = amap_loss(list(groups.values()), n_ranks=n_ranks, room=room)
    amap = from_preset("amap")
    plans = [plan(room, algorithm=amap, dp_rank=r, dp_size=n_ranks) for r in range(n_ranks)]
    got = packed_loss([batch for mine in plans for batch in make_batches(samples, mine)])
    assert got == pytest.approx(expected, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("knob", ["kl_coef", "entropy_coef"])
def test_samples_without_advantage_are_computed_when_the_loss_has_more_terms(knob: str) -> None:
    groups = [toy_group((1, 0), (4, 0)), toy_group((0, 0), (6, 6), number=1)]
    ((batch,),) = ranks_of(groups, from_preset("paper", **{knob: 0.1}), 100)
    assert sorted(n for n, _, _ in tokens_of(batch.micro_batches[0])) == [4, 6, 6]
    assert batch.n_skipped_tokens == 2, "an empty response has no token"
    ((plain,),) = ranks_of(groups, AlgorithmConfig(), 100)
    assert plain.n_skipped_tokens == 2 + 8 + 8


def test_a_step_that_is_skipped_has_nothing_to_compute() -> None:
    groups = [toy_group((1, 0), (4, 2))]
    ((batch,),) = ranks_of(groups, AlgorithmConfig())
    assert (batch.n_computed_tokens, batch.n_shared_tokens, batch.n_skipped_tokens) == (7, 3, 0)
    for (skipped,) in ranks_of(groups, AlgorithmConfig(), dp_size=3, skipped=True):
        assert not len(skipped.micro_batches) and skipped.n_computed_tokens == 0
        assert (skipped.n_skipped_tokens, skipped.n_shared_tokens, skipped.flops) == (10, 0, 0.0)
        assert skipped.alpha == batch.alpha


@given(rollout_batches())
def test_each_loss_token_knows_its_response(samples: Sequence[TrainSample]) -> None:
    mb = pack(samples, [1.0] * len(samples))
    got = mb.responses_T[mb.loss_mask_T].tolist()
    assert got == [i for i, s in enumerate(samples) for _ in s.response_token_ids]
    assert not mb.responses_T[~mb.loss_mask_T].any()


def test_what_no_engine_has_said_is_counted() -> None:
    """A prompt of 3 tokens for two answers of 2, one of them known by half; and one alone."""
    prompt = (1, 2, 3)
    whole = train_sample(prompt, (4, 5), routing=routing((1, 2), (3, 4)))
    half = train_sample(prompt, (6, 7), index=1, routing=routing((1, 2), (3,)))
    alone = train_sample((8,), (9,), group=1, routing=routing((), (5,)))
    bare = [replace(sample, routing=NO_ROUTING) for sample in (whole, half, alone)]
    (shared,), (apart,), (none,) = (
        update(samples, 1, max_tokens=50, share=share)
        for samples, share in (
            ([whole, half, alone], True),
            ([whole, half, alone], False),
            (bare, True),
        )
    )
    # 2 of the prompt, 2 and 2 of the answers, 1 of the other: that before its last token
    assert shared.unrouted == pytest.approx(1 / 7)
    assert apart.unrouted == pytest.approx(1 / 9)
    assert none.unrouted == 1.0
    (full,) = update([whole, alone], 1, max_tokens=50)
    assert full.unrouted == 0.0
