"""The GPG loss: values by hand, gradients in closed form, and equality with PPO on-policy."""

from __future__ import annotations

import math

import pytest
import torch

from gpg_megatron.algorithm.loss import gpg_loss


def gradient(loss: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(loss, of)[0]


def test_value_by_hand() -> None:
    loss = gpg_loss(
        torch.tensor([-1.0, -2.0]), torch.tensor([2.0, -1.0]), torch.tensor([0.5, 0.25])
    )
    assert loss.shape == () and loss.dtype == torch.float32
    assert loss.item() == -(-1.0 * 2.0 * 0.5 + -2.0 * -1.0 * 0.25)


def test_gradient_is_minus_advantage_times_weight() -> None:
    torch.manual_seed(0)
    logprobs = torch.randn(20, dtype=torch.float64, requires_grad=True)
    advantages, weights = torch.randn(20).double(), torch.rand(20).double()
    got = gradient(gpg_loss(logprobs, advantages, weights), logprobs)
    assert torch.equal(got, -advantages * weights)


def test_gradient_through_softmax_is_the_policy_gradient() -> None:
    # d/dz -log softmax(z)[a] * A * w = (softmax(z) - onehot(a)) * A * w
    torch.manual_seed(1)
    logits = torch.randn(6, 11, dtype=torch.float64, requires_grad=True)
    actions = torch.randint(11, (6,))
    advantages, weights = torch.randn(6).double(), torch.rand(6).double()
    logprobs = logits.log_softmax(-1)[torch.arange(6), actions]
    got = gradient(gpg_loss(logprobs, advantages, weights), logits)
    onehot = torch.nn.functional.one_hot(actions, 11).double()
    scale = (advantages * weights)[:, None]
    torch.testing.assert_close(got, (logits.detach().softmax(-1) - onehot) * scale)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_log_prob_is_not_hidden(bad: float) -> None:
    assert not math.isfinite(gpg_loss(torch.tensor([bad, -1.0]), *torch.ones(2, 2)).item())


def test_no_tokens_give_zero_with_a_gradient() -> None:
    logprobs = torch.zeros(0, requires_grad=True)
    loss = gpg_loss(logprobs, *torch.ones(2, 0))
    assert loss.item() == 0.0
    assert gradient(loss, logprobs).shape == (0,)


def test_half_precision_log_probs_are_summed_in_float32() -> None:
    n = 4097
    logprobs = torch.full((n,), -1.0, dtype=torch.bfloat16, requires_grad=True)
    ones = torch.ones(n, dtype=torch.bfloat16)
    loss = gpg_loss(logprobs, ones, ones)
    assert (loss.item(), loss.dtype) == (4097.0, torch.float32)
    assert gradient(loss, logprobs).dtype == torch.bfloat16


def test_shapes_are_checked() -> None:
    x = torch.ones(3)
    with pytest.raises(AssertionError, match="equal"):
        gpg_loss(x, torch.ones(1), x)
    with pytest.raises(AssertionError, match="equal"):
        gpg_loss(x, x, x[None])


@pytest.mark.parametrize("epsilon", [0.1, 0.2])
def test_on_policy_the_gradient_is_that_of_the_clipped_surrogate(epsilon: float) -> None:
    torch.manual_seed(2)
    logits = torch.randn(32, 13, dtype=torch.float64, requires_grad=True)
    actions = torch.randint(13, (32,))
    advantages, weights = torch.randn(32).double(), torch.rand(32).double()
    logprobs = logits.log_softmax(-1)[torch.arange(32), actions]
    ratio = torch.exp(logprobs - logprobs.detach())
    clipped = ratio.clamp(1 - epsilon, 1 + epsilon)
    surrogate = -(torch.minimum(ratio * advantages, clipped * advantages) * weights).sum()
    (expected,) = torch.autograd.grad(surrogate, logits, retain_graph=True)
    got = gradient(gpg_loss(logprobs, advantages, weights), logits)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-15)
    assert got.abs().max() > 0.1
