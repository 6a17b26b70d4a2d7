"""When the engines' log-probs are too far from the policy's to go on."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from gpg_megatron.loop.agreement import (
    FACTOR,
    FAR,
    FLOOR,
    Distance,
    Limit,
    MismatchError,
    distance,
    judge,
    measured_limit,
    step_distance,
    worst_token,
)
from gpg_megatron.types import Completion, Prompt, VersionSpan
from tests.samples import float32, int32

BF16, FP32 = 2.0**-8, 2.0**-24
"""Unit roundoffs."""


def pair(name: str, logprobs: tuple[float, ...]) -> tuple[Prompt, Completion]:
    prompt = Prompt(id=name, token_ids=int32((1, 2)), messages=(), ground_truth="", data_source="d")
    n = len(logprobs)
    completion = Completion(
        prompt_id=name,
        index=0,
        token_ids=int32(range(3, 3 + n)),
        logprobs=float32(logprobs),
        finish_reason="stop",
        text="",
        versions=(VersionSpan(version=0, start=0, end=n),),
    )
    return prompt, completion


# ---- by hand -----------------------------------------------------------------------------------


def test_the_distance_of_two_tokens() -> None:
    engine = torch.tensor([0.5, 0.25]).log()
    found = distance(engine, engine + torch.tensor([0.5, -0.25]))
    assert found.mean == pytest.approx(0.375) and found.largest == pytest.approx(0.5)
    assert found.unlikely == pytest.approx((0.5 + 0.75) / 2)


def test_the_limit_is_what_rounding_does_for_each_unit_of_improbability() -> None:
    policy = torch.tensor([0.5, 0.5]).log()
    moved = [policy + torch.tensor([0.1, 0.0]), policy - torch.tensor([0.0, 0.3])]
    limit = measured_limit(policy, moved)
    assert limit.slope == pytest.approx(FACTOR * 0.1 / 0.5)
    sure = Distance(mean=0.0, largest=0.0, unlikely=0.01)
    assert limit.of(sure) == pytest.approx(FLOOR + limit.slope * 0.01)
    assert limit.far == pytest.approx(FAR * (FLOOR + limit.slope))


@pytest.mark.parametrize(
    ("mean", "largest", "named"),
    [
        (0.29, 8.9, None),
        (0.31, 0.5, "by 0.31 in the mean, the limit is 0.3 "),
        (0.10, 9.1, "by 9.1 at one token, the limit is 9 "),
        (math.nan, math.nan, "by nan in the mean"),
        (0.10, math.inf, "by inf at one token"),
    ],
)
def test_what_is_refused(mean: float, largest: float, named: str | None) -> None:
    found = Distance(mean=mean, largest=largest, unlikely=0.5)
    limit = Limit(floor=0.3, slope=0.0)
    if named is None:
        judge(found, limit, "step 3")
        return
    with pytest.raises(MismatchError) as caught:
        judge(found, limit, "step 3", "worst here")
    message = str(caught.value)
    assert message.startswith("step 3: ") and named in message and "\n" not in message
    assert "bridge.canary_tolerance); worst here; " in message and caught.value.everywhere


def test_a_step_without_a_gradient_has_nothing_to_compare() -> None:
    assert step_distance({}) is None


@pytest.mark.parametrize("wrong", [9.0, math.nan])
def test_the_worst_token_is_named(wrong: float) -> None:
    pairs = [pair("a", (-1.0, -2.0)), pair("b", (-3.0,))]
    text = worst_token(pairs, torch.tensor([0.0, 0.25, wrong]))
    assert "prompt b, token 0" in text and "-3.0" in text


# ---- a model of logits -------------------------------------------------------------------------


class Logits:
    """A model that is nothing but its logits, which programs round differently."""

    def __init__(self, n_tokens: int, *, scale: float, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.logits = scale * self._normal(n_tokens, 64)
        self.tokens = torch.multinomial(self.logits.softmax(1), 1, generator=self.generator)

    def logprobs(self, unit: float, *, other: float = 0.0) -> torch.Tensor:
        """Of the sampled tokens, computed with errors of some units roundoff of the largest
        logits, after the weights moved by `other`."""
        size = float(self.logits.abs().max())
        logits = self.logits + (unit * size + other) * self._normal(*self.logits.shape)
        return logits.log_softmax(1).gather(1, self.tokens).squeeze(1)

    def limit(self, unit: float) -> Limit:
        policy = self.logprobs(unit)
        return measured_limit(policy, [self.logprobs(unit) for _ in range(2)])

    def _normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)


def is_refused(engine: torch.Tensor, policy: torch.Tensor, limit: Limit) -> bool:
    try:
        judge(distance(engine, policy), limit, "now")
    except MismatchError:
        return True
    return False


@pytest.mark.parametrize("unit", [BF16, FP32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("canary", [64, 256])
def test_two_right_programs_are_never_refused(unit: float, canary: int) -> None:
    """Many runs: flat and peaked models, the canary and much larger steps, and steps whose
    tokens are much surer or less sure than those of the canary."""
    for seed in range(3):
        for scale in (0.5, 2.0, 6.0):
            model = Logits(canary, scale=scale, seed=seed)
            limit = model.limit(unit)
            assert not is_refused(model.logprobs(unit), model.logprobs(unit), limit)
            size = float(model.logits.abs().max())
            for factor in (0.7, 1.3):
                later = Logits(512, scale=factor * scale, seed=1000 + seed)
                same = unit * size / float(later.logits.abs().max())
                assert not is_refused(later.logprobs(same), later.logprobs(same), limit)


@pytest.mark.parametrize(("unit", "moved"), [(BF16, 0.5), (FP32, 1e-3)], ids=["bf16", "fp32"])
def test_other_weights_are_always_refused(unit: float, moved: float) -> None:
    """Logits that are elsewhere by half a nat, in fp32 by a thousandth."""
    for seed in range(5):
        model = Logits(256, scale=2.0, seed=seed)
        limit = model.limit(unit)
        assert is_refused(model.logprobs(unit, other=moved), model.logprobs(unit), limit)


def test_one_far_token_among_many_is_no_fault_and_one_that_is_nowhere_is() -> None:
    model = Logits(4096, scale=2.0, seed=1)
    limit, policy = model.limit(BF16), model.logprobs(BF16)
    for gap, refused in ((0.5 * limit.far, False), (1.5 * limit.far, True)):
        engine = model.logprobs(BF16)
        engine[7] = policy[7] - gap
        assert is_refused(engine, policy, limit) is refused


def test_the_user_s_limit_is_that_of_the_mean() -> None:
    limit = Limit(floor=0.25, slope=0.0)
    found = Distance(mean=0.2, largest=5.0, unlikely=0.5)
    judge(found, limit, "now")
    with pytest.raises(MismatchError, match=r"from bridge\.canary_tolerance"):
        judge(replace(found, mean=0.26), limit, "now")
