"""When the engines' log-probs are too far from the policy's to go on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from gpg_megatron.batching.updates import pack
from gpg_megatron.loop.agreement import MismatchError, canary_sample, check_canary, check_mismatch
from gpg_megatron.types import Completion, Prompt, StepResult, VersionSpan

LIMIT = 1e-4


def pair(name: str, logprobs: tuple[float, ...]) -> tuple[Prompt, Completion]:
    prompt = Prompt(id=name, token_ids=(1, 2), messages=(), ground_truth="", data_source="d")
    n = len(logprobs)
    completion = Completion(
        prompt_id=name,
        index=0,
        token_ids=tuple(range(3, 3 + n)),
        logprobs=logprobs,
        finish_reason="stop",
        text="",
        versions=(VersionSpan(version=0, start=0, end=n),),
    )
    return prompt, completion


def step(mean: float, largest: float) -> StepResult:
    metrics = {"mismatch/logprob_mean": mean, "mismatch/logprob_max": largest}
    return StepResult(version=1, updated=True, loss=0.0, grad_norm=1.0, lr=1.0, metrics=metrics)


PAIRS = [pair("a", (-1.0, -2.0)), pair("b", (-3.0,))]
BATCH = pack([canary_sample(p, c) for p, c in PAIRS], [1.0] * 2)


def test_the_largest_gap_of_the_canary() -> None:
    gap = check_canary(PAIRS, BATCH, torch.tensor([-1.0, -2.25, -3.125]), 0.5)
    assert gap == 0.25


@pytest.mark.parametrize("wrong", [-2.0, float("nan")])
def test_a_canary_that_disagrees_names_the_token(wrong: float) -> None:
    with pytest.raises(MismatchError, match=r"worst at prompt b, token 0.*-3\.0") as caught:
        check_canary(PAIRS, BATCH, torch.tensor([-1.0, -2.0, wrong]), 0.5)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("mean", "largest", "named"),
    [
        (9e-5, 9e-4, None),
        (1e-6, 2e-4, None),  # one unlikely token
        (1e-6, 1.1e-3, "max over the tokens; limit 0.001"),
        (1.1e-4, 2e-4, "mean over the tokens; limit 0.0001"),
    ],
)
def test_a_step_that_disagrees(mean: float, largest: float, named: str | None) -> None:
    if named is None:
        check_mismatch(3, step(mean, largest), LIMIT)
        return
    with pytest.raises(MismatchError, match=f"step 3: .*{named}"):
        check_mismatch(3, step(mean, largest), LIMIT)


def test_a_step_without_a_gradient_has_nothing_to_compare() -> None:
    check_mismatch(3, replace(step(0.0, 0.0), metrics={}), LIMIT)
