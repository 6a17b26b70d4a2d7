"""Every preset's loss against a float64 reference that is written out here, from the rewards up."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean, pstdev, stdev

import pytest
import torch

from gpg_megatron.algorithm.advantages import assign_advantages
from gpg_megatron.algorithm.correction import correction_weights
from gpg_megatron.algorithm.loss import (
    clip_loss,
    gpg_loss,
    kl_k3,
    sequence_ratio,
    token_ratio,
)
from gpg_megatron.algorithm.objective import MAXIMA, SUMS, Tokens, metrics, objective
from gpg_megatron.algorithm.update import weigh_update
from gpg_megatron.config.algorithm import PRESETS, AlgorithmConfig
from gpg_megatron.types import Completion, Prompt, Reward, ScoredGroup, VersionSpan
from tests.presets import from_preset
from tests.samples import float32, int32
from tests.unit.amap import Answer, amap_loss

MAX_RESPONSE = 9
PROMPT = 2
ROOM = 30
"""Tokens of a micro-batch."""


def group(number: int, scores: Sequence[float], lengths: Sequence[int]) -> ScoredGroup:
    name = f"toy/{number}"
    completions = tuple(
        Completion(
            prompt_id=name,
            index=i,
            token_ids=int32((7,) * n),
            logprobs=float32(-0.5 - 0.1 * ((number + i + t) % 5) for t in range(n)),
            finish_reason="stop",
            text="",
            versions=(VersionSpan(version=0, start=0, end=n),) if n else (),
        )
        for i, n in enumerate(lengths)
    )
    return ScoredGroup(
        prompt=Prompt(
            id=name, token_ids=int32((1,) * PROMPT), messages=(), ground_truth="", data_source="toy"
        ),
        completions=completions,
        rewards=tuple(Reward(score=s, accuracy=float(s > 0.5), parts={}) for s in scores),
    )


def batch_of(*rows: tuple[list[float], list[int]]) -> list[ScoredGroup]:
    return [group(number, *row) for number, row in enumerate(rows)]


BATCHES = {
    "ragged": batch_of(
        ([1.0, 0.0, 0.0], [4, 9, 1]), ([1.0, 1.0, 1.0], [2, 2, 3]), ([0.0, 1.0, 1.0], [5, 6, 7])
    ),
    "all dead": batch_of(([1.0, 1.0], [4, 2]), ([0.0, 0.0], [3, 3])),
    "one live": batch_of(([0.0, 0.0], [4, 2]), ([0.0, 1.0], [3, 8]), ([1.0, 1.0], [1, 1])),
    "shaped": batch_of(([1.2, 0.1, 0.3], [4, 9, 1]), ([0.1, 0.3, 0.2], [2, 2, 3])),
    "plus and minus": batch_of(([1.0, -1.0], [4, 9]), ([-1.0, -1.0], [2, 3])),
    "huge": batch_of(([1e6, -1e6, 0.0], [4, 2, 2]), ([1e6, 1e6, 1e6], [2, 2, 2])),
    "an empty answer": batch_of(([1.0, 0.0, 0.0], [4, 0, 3]), ([0.0, 0.0, 1.0], [0, 2, 2])),
}


def reference(
    groups: Sequence[ScoredGroup], preset: str, logprobs: Sequence[Sequence[Sequence[float]]]
) -> float:
    """The loss of a preset as docs/gpg.md states it; logprobs[g][i] are floats of one answer.

    On-policy, so that a clipped surrogate is the sum of the advantages: its ratios are 1.
    """
    scores = [[r.score for r in g.rewards] for g in groups]
    answers = [(g, i) for g, row in enumerate(scores) for i in range(len(row))]
    length = {(g, i): len(logprobs[g][i]) for g, i in answers}

    def value(g: int, i: int) -> float:
        return scores[g][i] - fmean(scores[g])

    if preset == "rloo":
        advantage = {
            (g, i): scores[g][i] - (sum(scores[g]) - scores[g][i]) / (len(scores[g]) - 1)
            for g, i in answers
        }
    elif preset in ("reinforce++", "reinforce++-baseline"):
        own = {a: value(*a) if preset.endswith("baseline") else scores[a[0]][a[1]] for a in answers}
        tokens = [own[a] for a in answers for _ in range(length[a])]
        variance = pstdev(tokens) ** 2 * len(tokens) / (len(tokens) - 1)
        root = math.sqrt(variance + 1e-8)
        advantage = {a: (own[a] - fmean(tokens)) / root for a in answers}
    elif preset == "maxrl":
        means = [fmean(row) for row in scores]
        advantage = {(g, i): value(g, i) / means[g] if means[g] > 0 else 0.0 for g, i in answers}
    elif preset in ("grpo", "dapo", "gspo", "cispo", "rgra"):
        advantage = {(g, i): value(g, i) / (stdev(scores[g]) + 1e-6) for g, i in answers}
    else:
        advantage = {(g, i): value(g, i) for g, i in answers}
    worth = scores if preset == "amap" else [[r.accuracy for r in g.rewards] for g in groups]
    live = {(g, i): max(worth[g]) - min(worth[g]) > 1e-6 for g, i in answers}

    def corrected(members: Sequence[tuple[int, int]]) -> float:
        n_live = sum(live[a] for a in members)
        if preset == "paper":
            return len(members) / n_live if n_live else 0.0
        if preset == "verl":
            return len(members) / max(1, sum(scores[g][i] != 0 for g, i in members))
        return 1.0

    if preset in ("paper", "amap"):
        advantage = {a: x if live[a] else 0.0 for a, x in advantage.items()}
    policy_gradient = not PRESETS[preset].get("loss", "gpg").startswith("clip")
    total = {
        (g, i): advantage[g, i] * (sum(logprobs[g][i]) if policy_gradient else length[g, i])
        for g, i in answers
    }
    alpha = corrected(answers)
    if preset == "paper":
        by_group = [[(g, i) for g2, i in answers if g2 == g] for g in range(len(groups))]
        means = [sum(total[a] for a in m) / sum(length[a] for a in m) for m in by_group]
        return -alpha * fmean(means)
    if preset == "amap":
        rows = [
            [
                Answer(
                    n_prompt=PROMPT,
                    logprobs=tuple(row),
                    advantage=advantage[g, i],
                    live=live[g, i],
                )
                for i, row in enumerate(rows_of_group)
            ]
            for g, rows_of_group in enumerate(logprobs)
        ]
        return amap_loss(rows, n_ranks=1, room=ROOM)
    if preset in ("verl", "reinforce++", "reinforce++-baseline", "dapo", "cispo", "maxrl"):
        return -alpha * sum(total.values()) / sum(length.values())
    if preset in ("grpo", "gspo", "rgra"):
        return -sum(total[a] / length[a] for a in answers if length[a]) / len(answers)
    if preset == "dr-grpo":
        return -sum(total.values()) / (len(answers) * MAX_RESPONSE)
    assert preset == "rloo"
    return -sum(total.values()) / len(answers)


def parts_of(groups: Sequence[ScoredGroup], config: AlgorithmConfig) -> Tokens:
    """The response tokens of a rollout batch as one micro-batch, in order."""
    samples, _ = assign_advantages(groups, config)
    update = weigh_update(
        samples, config, dp_size=1, max_tokens=ROOM, max_response_length=MAX_RESPONSE
    )
    rows = [
        (s.advantage, w, k, x)
        for k, (s, w) in enumerate(zip(update.samples, update.weights, strict=True))
        for x in s.rollout_logprobs
    ]
    advantages, per_token, responses, rollout = zip(*rows, strict=True)
    return Tokens(
        advantages=torch.tensor(advantages, dtype=torch.float64),
        weights=torch.tensor(per_token, dtype=torch.float64),
        rollout=torch.tensor(rollout, dtype=torch.float64),
        responses=torch.tensor(responses),
        old=None,
        reference=None,
    )


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_its_formula(preset: str, name: str) -> None:
    rng = random.Random(3)
    groups = BATCHES[name]
    logprobs = [
        [[rng.uniform(-3.0, -0.1) for _ in c.token_ids] for c in g.completions] for g in groups
    ]
    flat = torch.tensor([x for g in logprobs for row in g for x in row], dtype=torch.float64)
    config = from_preset(preset)
    on_policy = replace(parts_of(groups, config), rollout=flat)
    loss, _ = objective(flat, None, on_policy, config)
    assert loss.item() == pytest.approx(reference(groups, preset, logprobs), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("clip", [0.1, 0.2])
@pytest.mark.parametrize("name", BATCHES)
def test_on_policy_gpg_has_the_gradient_of_the_clipped_surrogate(name: str, clip: float) -> None:
    """Through a softmax, in float64; with the paper's advantages."""
    gpg = from_preset("paper")
    clipped = from_preset("paper", loss="clip", clip_low=clip, clip_high=clip)
    tokens = parts_of(BATCHES[name], gpg)
    torch.manual_seed(1)
    logits = torch.randn(len(tokens.rollout), 5, dtype=torch.float64, requires_grad=True)
    actions = torch.randint(5, (len(logits),))
    gradients = []
    for config in (gpg, clipped):
        logprobs = logits.log_softmax(-1)[torch.arange(len(logits)), actions]
        loss, _ = objective(logprobs, None, tokens, config)
        gradients.append(torch.autograd.grad(loss, logits)[0])
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-15)
    assert gradients[0].any() == (name != "all dead")


def test_clip_by_hand() -> None:
    """Ratios 2, 1/2, 2, 1/2 and 1.1 with advantages of both signs, clipped to [0.8, 1.3]."""
    ratios = torch.tensor([2.0, 0.5, 2.0, 0.5, 1.1], dtype=torch.float64)
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0, 3.0], dtype=torch.float64)
    logprobs = (ratios.log() - 1.0).requires_grad_()
    old = torch.full((5,), -1.0)
    loss, clipped = clip_loss(
        token_ratio(logprobs, old), advantages, torch.full((5,), 0.5), low=0.2, high=0.3
    )
    assert loss.item() == pytest.approx(-0.5 * (1.3 + 0.5 - 2.0 - 0.8 + 3.3))
    assert clipped.tolist() == [True, False, False, True, False]
    loss.backward()
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == pytest.approx([0.0, -0.25, 1.0, 0.0, -1.65])


def test_one_ratio_for_each_response_by_hand() -> None:
    """Responses of two and three tokens with the ratios 4, 1 and 1/8, 1, 1: geometric means 2 and
    1/2. Each token has the gradient of its own log-prob."""
    ratios = torch.tensor([4.0, 1.0, 0.125, 1.0, 1.0], dtype=torch.float64)
    logprobs = (ratios.log() - 1.0).requires_grad_()
    responses = torch.tensor([0, 0, 1, 1, 1])
    got = sequence_ratio(logprobs, torch.full((5,), -1.0), responses)
    assert got.tolist() == pytest.approx([2.0, 2.0, 0.5, 0.5, 0.5])
    (got * torch.arange(1.0, 6.0)).sum().backward()
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == pytest.approx([2.0, 4.0, 1.5, 2.0, 2.5])


def test_gspo_clips_whole_responses() -> None:
    """The ratios of four() are 4 1 and 0.5 1: means 2 and 0.71. The first has a positive advantage
    and the second a negative one, so each is beyond its border."""
    config = from_preset("gspo", old_logprobs="policy")
    _, gradient, named = run(config, four(old=[-1.0] * 4))
    assert gradient == [0.0] * 4
    assert named["policy/clip_fraction"] == 1.0
    wide = replace(config, clip_low=0.5, clip_high=1.5)
    _, gradient, _ = run(wide, four(old=[-1.0] * 4))
    expected = [-2.0 * 0.25, -2.0 * 0.25, 2.0 * 0.25 * 0.5**0.5, 2.0 * 0.25 * 0.5**0.5]
    assert gradient == pytest.approx(expected)


def test_kl_by_hand_and_its_mean_over_samples_is_the_divergence() -> None:
    got = kl_k3(torch.tensor([-1.0, -2.0]), torch.tensor([-1.0, -1.0])).tolist()
    assert got == pytest.approx([0.0, math.e - 2.0])
    torch.manual_seed(4)
    p, q = (torch.randn(6).double().log_softmax(-1) for _ in range(2))
    assert (p.exp() * kl_k3(p, q)).sum().item() == pytest.approx((p.exp() * (p - q)).sum().item())


# Two answers of two tokens, log-probs by hand.
def four(**more: list[float]) -> Tokens:
    values = {
        "advantages": [1.0, 1.0, -2.0, -2.0],
        "weights": [0.25] * 4,
        "rollout": [-1.0, -1.0, -1.0, -1.0],
    } | more
    tensors = {k: torch.tensor(v, dtype=torch.float64) for k, v in values.items()}
    old, reference = tensors.pop("old", None), tensors.pop("reference", None)
    responses = torch.tensor([0, 0, 1, 1])
    return Tokens(responses=responses, old=old, reference=reference, **tensors)


def numbers(statistics: dict[str, torch.Tensor]) -> dict[str, float]:
    return {name: value.item() for name, value in statistics.items()}


LOGPROBS = [-1.0 + math.log(x) for x in (4.0, 1.0, 0.5, 1.0)]


def run(
    config: AlgorithmConfig, tokens: Tokens, entropy: torch.Tensor | None = None
) -> tuple[float, list[float], dict[str, float]]:
    logprobs = torch.tensor(LOGPROBS, dtype=torch.float64, requires_grad=True)
    loss, statistics = objective(logprobs, entropy, tokens, config)
    assert set(statistics) == {*SUMS, *MAXIMA}
    assert {(x.shape, x.dtype, x.requires_grad) for x in statistics.values()} == {
        (torch.Size(), torch.float32, False)
    }
    loss.backward()
    assert logprobs.grad is not None
    assert statistics["loss"].item() == pytest.approx(loss.item(), rel=1e-6)
    return loss.item(), logprobs.grad.tolist(), metrics(numbers(statistics), config)


def test_a_correction_scales_the_gradient_and_its_metrics_by_hand() -> None:
    config = from_preset("paper", correction="truncate-token", correction_max=2.0)
    _, gradient, named = run(config, four())
    assert gradient == pytest.approx([-0.5, -0.25, 0.25, 0.5])
    assert named["correction/cut_fraction"] == 0.25
    # ratios 4 1 0.5 1: sum 6.5, squares 18.25; cut at 2: 4.5 and 6.25
    assert named["correction/ess"] == pytest.approx(6.5**2 / (4 * 18.25))
    assert named["correction/ess_cut"] == pytest.approx(4.5**2 / (4 * 6.25))
    assert named["mismatch/kl_k1"] == pytest.approx(-math.log(2.0) / 4)
    k3 = (3 - math.log(4) + 0 + -0.5 + math.log(2)) / 4
    assert named["mismatch/kl_k3"] == pytest.approx(k3, rel=1e-6)
    assert named["mismatch/logprob_max"] == pytest.approx(math.log(4.0))
    assert named["mismatch/logprob_mean"] == pytest.approx(math.log(8.0) / 4)
    engine = four().rollout.exp()
    assert named["mismatch/unlikely_mean"] == pytest.approx((1 - engine).mean().item())


def test_without_a_correction_there_are_no_metrics_of_one() -> None:
    _, gradient, named = run(from_preset("paper"), four())
    assert gradient == [-0.25, -0.25, 0.5, 0.5]
    assert set(named) == {
        "mismatch/logprob_mean",
        "mismatch/logprob_max",
        "mismatch/unlikely_mean",
        "mismatch/kl_k1",
        "mismatch/kl_k3",
    }


@pytest.mark.parametrize(
    ("old_logprobs", "old", "expected"),
    [
        # the log-probs of the update itself: every ratio is 1, nothing is clipped
        ("current", None, ([-0.25, -0.25, 0.5, 0.5], 0.0)),
        # before the first update: ratios 4 1 0.5 1
        ("policy", [-1.0] * 4, ([0.0, -0.25, 0.0, 0.5], 0.5)),
        # before the first update the policy was where it is
        ("policy", LOGPROBS, ([-0.25, -0.25, 0.5, 0.5], 0.0)),
        # the engine's
        ("rollout", None, ([0.0, -0.25, 0.0, 0.5], 0.5)),
    ],
)
def test_what_the_ratio_is_divided_by(
    old_logprobs: str, old: list[float] | None, expected: tuple[list[float], float]
) -> None:
    config = from_preset("paper", loss="clip", old_logprobs=old_logprobs)
    _, gradient, named = run(config, four(**({"old": old} if old else {})))
    assert gradient == pytest.approx(expected[0])
    assert named["policy/clip_fraction"] == expected[1]
    if old_logprobs == "rollout":
        assert named["correction/ess"] == pytest.approx(6.5**2 / (4 * 18.25))


def test_a_correction_by_the_policys_own_log_probs() -> None:
    """Ratios 4 1 0.5 1 to the policy before the batch, the engine's are not read."""
    config = from_preset("paper", correction="truncate-token", old_logprobs="policy")
    _, gradient, named = run(config, four(old=[-1.0] * 4))
    plain = [-0.25, -0.25, 0.5, 0.5]
    assert gradient == pytest.approx([x * c for x, c in zip(plain, [2, 1, 0.5, 1], strict=True)])
    assert named["correction/cut_fraction"] == 0.25
    assert named["correction/ess"] == pytest.approx(6.5**2 / (4 * 18.25))


def test_the_correction_of_a_ratio_is_that_of_its_denominator() -> None:
    """pi / pi_old is in the loss; what is left to correct is pi_old / engine."""
    config = AlgorithmConfig(
        loss="clip", old_logprobs="policy", correction="truncate-token", correction_max=9.0
    )
    old = [-1.0 + math.log(2.0)] * 4
    _, gradient, _ = run(replace(config, clip_low=1.0, clip_high=9.0), four(old=old))
    ratios = [2.0, 0.5, 0.25, 0.5]
    expected = [-r * a * 0.25 * 2.0 for r, a in zip(ratios, [1, 1, -2, -2], strict=True)]
    assert gradient == pytest.approx(expected)


def test_the_kl_term_by_hand() -> None:
    """d/dlogp k3 = 1 - exp(reference - logp); alpha has no part in it."""
    config = from_preset("paper", kl_coef=0.5)
    tokens = four(advantages=[0.0] * 4, reference=[-1.0] * 4)
    loss, gradient, named = run(config, tokens)
    ratios = [1 / 4, 1.0, 2.0, 1.0]
    k3 = [r - 1 - math.log(r) for r in ratios]
    assert loss == pytest.approx(0.5 * 0.25 * sum(k3))
    assert gradient == pytest.approx([0.5 * 0.25 * (1 - r) for r in ratios])
    assert named["policy/kl"] == pytest.approx(sum(k3) / 4, rel=1e-6)


def test_the_entropy_bonus_by_hand() -> None:
    config = from_preset("paper", entropy_coef=0.1)
    entropy = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64, requires_grad=True)
    loss, _, named = run(config, four(advantages=[0.0] * 4), entropy)
    assert loss == pytest.approx(-0.1 * 0.25 * 10)
    assert entropy.grad is not None
    assert entropy.grad.tolist() == pytest.approx([-0.025] * 4)
    assert named["policy/entropy"] == 2.5


@pytest.mark.parametrize("knob", ["kl_coef", "entropy_coef"])
def test_a_term_without_what_it_needs_is_a_programming_error(knob: str) -> None:
    with pytest.raises(AssertionError):
        run(from_preset("paper", **{knob: 0.1}), four())


def test_no_tokens_give_zero_and_metrics() -> None:
    none = torch.zeros(0)
    tokens = Tokens(
        advantages=none,
        weights=none,
        rollout=none,
        responses=none.long(),
        old=None,
        reference=None,
    )
    for preset in PRESETS:
        config = from_preset(preset, correction="truncate-sequence")
        logprobs = torch.zeros(0, requires_grad=True)
        loss, statistics = objective(logprobs, None, tokens, config)
        loss.backward()
        assert loss.item() == 0.0
        assert all(value == 0.0 for value in metrics(numbers(statistics), config).values())


def test_the_pieces_are_the_published_functions() -> None:
    """objective adds nothing of its own to gpg_loss and the correction."""
    config = from_preset("paper", correction="mask-token", correction_max=3.0)
    tokens = four()
    logprobs = torch.tensor(LOGPROBS, dtype=torch.float64)
    loss, _ = objective(logprobs, None, tokens, config)
    factors, _ = correction_weights(logprobs, tokens.rollout, tokens.responses, config)
    assert loss == gpg_loss(logprobs, tokens.advantages, tokens.weights * factors)


def test_statistics_of_parts_combine_to_those_of_the_whole() -> None:
    torch.manual_seed(3)
    columns = {name: torch.randn(40).double() for name in ("advantages", "weights", "rollout")}
    logprobs = torch.randn(40).double()
    config = from_preset("paper", correction="truncate-token")

    def statistics(part: slice) -> dict[str, float]:
        mine = {name: values[part] for name, values in columns.items()}
        responses = torch.zeros(len(logprobs[part]), dtype=torch.int64)
        tokens = Tokens(**mine, responses=responses, old=None, reference=None)
        return numbers(objective(logprobs[part], None, tokens, config)[1])

    whole = statistics(slice(40))
    first, second = statistics(slice(13)), statistics(slice(13, 40))
    assert whole["tokens"] == 40 and whole["cut"] > 0
    for name in SUMS:
        assert first[name] + second[name] == pytest.approx(whole[name], rel=1e-5, abs=1e-5)
    for name in MAXIMA:
        assert max(first[name], second[name]) == whole[name]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_log_prob_is_not_hidden_in_the_statistics(bad: float) -> None:
    logprobs = torch.tensor([*LOGPROBS[:3], bad], dtype=torch.float64)
    config = from_preset("paper")
    named = metrics(numbers(objective(logprobs, None, four(), config)[1]), config)
    assert not math.isfinite(named["mismatch/logprob_mean"])
    assert not math.isfinite(named["mismatch/logprob_max"])
