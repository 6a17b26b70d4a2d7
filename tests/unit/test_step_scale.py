"""What scales a whole optimizer step: its effective sample size, and alpha beside the loss."""

from __future__ import annotations

from statistics import fmean
from typing import Any

import pytest
import torch

from gpg_megatron.algorithm.advantages import assign_advantages
from gpg_megatron.algorithm.objective import Tokens, metrics, objective
from gpg_megatron.batching.updates import BatchPlan, make_batches
from gpg_megatron.config.algorithm import update_rules
from gpg_megatron.model.flops import TokenCosts
from tests.presets import from_preset
from tests.unit.test_algorithm_objective import batch_of, numbers

N_ARMS = 20
BATCH = 32
STEPS = 48


def bandit(*, ess_lr: bool, age: int, signal: float, seed: int) -> tuple[float, float]:
    """Plain descent on a softmax over arms with rewards 0 .. signal and noise of deviation 1;
    answers are drawn anew every `age` updates.

    Returns:
        the expected reward at the end, the mean entropy of the policy over the run.
    """
    config = from_preset("paper", correction="truncate-token", ess_lr=ess_lr)
    draw = torch.Generator().manual_seed(seed)
    theta = torch.zeros(N_ARMS, dtype=torch.float64, requires_grad=True)
    rewards = torch.linspace(0.0, signal, N_ARMS, dtype=torch.float64)
    entropies = []
    for step in range(STEPS):
        if step % age == 0:
            engine = torch.log_softmax(theta.detach(), -1)
        arms = torch.multinomial(engine.exp(), BATCH, replacement=True, generator=draw)
        noise = torch.randn(BATCH, generator=draw, dtype=torch.float64)
        scores = rewards[arms] + noise
        tokens = Tokens(
            advantages=scores - scores.mean(),
            weights=torch.full((BATCH,), 1 / BATCH, dtype=torch.float64),
            rollout=engine[arms],
            responses=torch.arange(BATCH),
            old=None,
            reference=None,
        )
        loss, statistics = objective(torch.log_softmax(theta, -1)[arms], None, tokens, config)
        share = metrics(numbers(statistics), config)["correction/ess"] if ess_lr else 1.0
        (gradient,) = torch.autograd.grad(loss, theta)
        theta = (theta - 30.0 * share * gradient).detach().requires_grad_()
        policy = torch.softmax(theta.detach(), -1)
        entropies.append(-(policy * policy.clamp(min=1e-30).log()).sum().item())
    return float(policy @ rewards), fmean(entropies)


def mean_of(**settings: Any) -> tuple[float, float]:
    runs = [bandit(seed=seed, **settings) for seed in range(6)]
    return fmean(reward for reward, _ in runs), fmean(entropy for _, entropy in runs)


def test_steps_by_the_effective_sample_size_do_not_run_away_with_noise() -> None:
    """Without anything to learn, stale answers take a policy away from uniform by chance alone."""
    _, plain = mean_of(ess_lr=False, age=16, signal=0.0)
    _, scaled = mean_of(ess_lr=True, age=16, signal=0.0)
    assert scaled > 2 * plain
    plain, scaled = (mean_of(ess_lr=on, age=16, signal=9.0)[0] for on in (False, True))
    assert scaled > 0.95 * 9.0 > plain


def test_on_policy_the_step_is_what_it_was() -> None:
    found = [bandit(ess_lr=ess_lr, age=1, signal=1.0, seed=1) for ess_lr in (False, True)]
    assert found[0] == pytest.approx(found[1], rel=1e-6)


BATCH_OF_THREE = batch_of(
    ([1.0, 0.0], [2, 4]), ([1.0, 1.0], [5, 7]), ([0.0, 1.0], [5, 1]), ([0.0, 0.0], [1, 1])
)


@pytest.mark.parametrize(
    ("scope", "factors"), [("batch", [2.0, 2.0]), ("mini-batch", [2.0, 2.0]), ("none", [1.0, 1.0])]
)
def test_alpha_is_in_the_loss_or_beside_it(scope: str, factors: list[float]) -> None:
    """Two updates of two groups, one of them live each."""
    plan: dict[str, Any] = {
        "n_updates": 2,
        "max_tokens": 64,
        "max_response_length": 9,
        "dp_rank": 0,
        "dp_size": 1,
        "costs": TokenCosts(per_token=1.0, per_loss_token=1.0, per_pair=1.0),
        "share_prompts": True,
    }
    keys = {"alpha": "none"} if scope == "none" else {"alpha_scope": scope}
    made = {}
    for apply in ("loss", "step"):
        config = from_preset("paper", alpha_apply=apply, **keys)
        samples, stats = assign_advantages(BATCH_OF_THREE, config)
        made[apply] = make_batches(samples, BatchPlan(algorithm=config, **plan))
        assert [batch.whole_alpha for batch in made[apply]] == factors
        assert stats.alpha * made[apply][0].alpha == factors[0]
    for loss, step, factor in zip(made["loss"], made["step"], factors, strict=True):
        whole = loss.micro_batches[0].advantages_T
        torch.testing.assert_close(whole, factor * step.micro_batches[0].advantages_T)
        assert set(step.micro_batches[0].advantages_T.abs().tolist()) == {0.0, 0.5}


@pytest.mark.parametrize(
    ("explicit", "message"),
    [
        ({"ess_lr": True}, "ess_lr is true, but no ratio weighs the answers"),
        ({"alpha_apply": "step", "kl_coef": 0.1}, "alpha_apply=step scales the whole update"),
        ({"alpha_apply": "step", "alpha_scope": "micro-batch"}, "alpha is no single factor"),
        ({"alpha_effective_freq": 9, "entropy_coef": 0.1}, "which alpha leaves alone; expected 0"),
        ({"ess_lr": True, "correction": "mask-token", "alpha_effective_freq": 9}, ""),
        ({"alpha_apply": "step", "alpha_scope": "mini-batch"}, ""),
    ],
)
def test_what_does_not_fit_together(explicit: dict[str, Any], message: str) -> None:
    said = [said for is_broken, said in update_rules(from_preset("paper", **explicit)) if is_broken]
    assert len(said) == bool(message) and all(message in one for one in said)
