"""The GPG loss: values by hand, gradients in closed form, and equality with PPO on-policy."""

from __future__ import annotations

import math

import pytest
import torch

from gpg_megatron.algorithm.loss import gpg_loss, logprob_mismatch

BAD = [math.nan, math.inf, -math.inf]


def test_value_by_hand():
    loss = gpg_loss(
        torch.tensor([-1.0, -2.0, -3.0]),
        torch.tensor([2.0, -1.0, 5.0]),
        torch.tensor([0.5, 0.25, 7.0]),
        torch.tensor([True, True, False]),
    )
    assert loss.shape == () and loss.dtype == torch.float32
    assert loss.item() == -(-1.0 * 2.0 * 0.5 + -2.0 * -1.0 * 0.25)


def test_gradient_is_minus_advantage_times_weight_where_the_mask_is_true():
    torch.manual_seed(0)
    logprobs = torch.randn(20, dtype=torch.float64, requires_grad=True)
    advantages, weights = torch.randn(20).double(), torch.rand(20).double()
    mask = torch.rand(20) < 0.5
    gpg_loss(logprobs, advantages, weights, mask).backward()
    expected = torch.where(mask, -advantages * weights, 0.0)
    assert torch.equal(logprobs.grad, expected)


def test_gradient_through_softmax_is_the_policy_gradient():
    # d/dz -log softmax(z)[a] * A * w = (softmax(z) - onehot(a)) * A * w
    torch.manual_seed(1)
    logits = torch.randn(6, 11, dtype=torch.float64, requires_grad=True)
    actions = torch.randint(11, (6,))
    advantages, weights = torch.randn(6).double(), torch.rand(6).double()
    mask = torch.tensor([True, False, True, True, False, True])
    logprobs = logits.log_softmax(-1)[torch.arange(6), actions]
    gpg_loss(logprobs, advantages, weights, mask).backward()
    onehot = torch.nn.functional.one_hot(actions, 11).double()
    scale = (advantages * weights * mask)[:, None]
    torch.testing.assert_close(logits.grad, (logits.detach().softmax(-1) - onehot) * scale)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("where", [0, 1, 2])
def test_nothing_flows_where_the_mask_is_false(bad, where):
    inputs = [torch.tensor([-1.0, -2.0]), torch.tensor([3.0, 1.0]), torch.tensor([0.5, 1.0])]
    inputs[where][1] = bad
    logprobs = inputs[0].requires_grad_()
    loss = gpg_loss(*inputs, torch.tensor([True, False]))
    loss.backward()
    assert loss.item() == 1.5
    assert logprobs.grad.tolist() == [-1.5, 0.0]


def test_a_bad_log_prob_inside_the_mask_is_not_hidden():
    loss = gpg_loss(torch.tensor([math.nan]), *torch.ones(2, 1), torch.tensor([True]))
    assert math.isnan(loss.item())


def test_an_all_false_mask_gives_zero_with_a_zero_gradient():
    logprobs = torch.tensor([-1.0, -2.0], requires_grad=True)
    loss = gpg_loss(logprobs, *torch.ones(2, 2), torch.tensor([False, False]))
    loss.backward()
    assert loss.item() == 0.0
    assert logprobs.grad.tolist() == [0.0, 0.0]


def test_half_precision_log_probs_are_summed_in_float32():
    n = 4097
    logprobs = torch.full((n,), -1.0, dtype=torch.bfloat16, requires_grad=True)
    mask = torch.ones(n, dtype=torch.bool)
    ones = torch.ones(n, dtype=torch.bfloat16)
    loss = gpg_loss(logprobs, ones, ones, mask)
    assert (loss.item(), loss.dtype) == (4097.0, torch.float32)
    loss.backward()
    assert logprobs.grad.dtype == torch.bfloat16


def test_shapes_and_mask_type_are_checked():
    x, mask = torch.ones(3), torch.ones(3, dtype=torch.bool)
    with pytest.raises(AssertionError, match="equal"):
        gpg_loss(x, torch.ones(1), x, mask)
    with pytest.raises(AssertionError, match="equal"):
        gpg_loss(x[None], x[None], x[None], mask[None])
    with pytest.raises(AssertionError, match="bool"):
        gpg_loss(x, x, x, x)


@pytest.mark.parametrize("epsilon", [0.1, 0.2])
def test_on_policy_the_gradient_is_that_of_the_clipped_surrogate(epsilon):
    torch.manual_seed(2)
    logits = torch.randn(32, 13, dtype=torch.float64, requires_grad=True)
    actions = torch.randint(13, (32,))
    advantages, weights = torch.randn(32).double(), torch.rand(32).double()
    mask = torch.rand(32) < 0.7
    logprobs = logits.log_softmax(-1)[torch.arange(32), actions]
    ratio = torch.exp(logprobs - logprobs.detach())
    clipped = ratio.clamp(1 - epsilon, 1 + epsilon)
    surrogate = -(torch.minimum(ratio * advantages, clipped * advantages) * weights)[mask].sum()
    (expected,) = torch.autograd.grad(surrogate, logits, retain_graph=True)
    (got,) = torch.autograd.grad(gpg_loss(logprobs, advantages, weights, mask), logits)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-15)
    assert got.abs().max() > 0.1


def test_mismatch_by_hand():
    mismatch = logprob_mismatch(
        torch.tensor([-1.0, -2.0, -5.0], requires_grad=True),
        torch.tensor([-1.25, -1.5, 0.0]),
        torch.tensor([True, True, False]),
    )
    assert (mismatch.abs_sum.item(), mismatch.abs_max.item()) == (0.75, 0.5)
    assert mismatch.n_tokens.item() == 2
    assert not mismatch.abs_sum.requires_grad and not mismatch.abs_max.requires_grad


@pytest.mark.parametrize("bad", BAD)
def test_mismatch_looks_at_the_mask_only_and_hides_nothing_inside_it(bad):
    logprobs, rollout = torch.tensor([-1.0, bad]), torch.tensor([-1.0, 0.0])
    outside = logprob_mismatch(logprobs, rollout, torch.tensor([True, False]))
    assert (outside.abs_sum.item(), outside.abs_max.item()) == (0.0, 0.0)
    inside = logprob_mismatch(logprobs, rollout, torch.tensor([True, True]))
    assert not math.isfinite(inside.abs_sum.item()) and not math.isfinite(inside.abs_max.item())


def test_mismatch_without_tokens():
    for n in (0, 2):
        x = torch.zeros(n)
        mismatch = logprob_mismatch(x, x, torch.zeros(n, dtype=torch.bool))
        assert mismatch.n_tokens.item() == 0
        assert (mismatch.abs_sum.item(), mismatch.abs_max.item()) == (0.0, 0.0)


def test_mismatch_of_parts_combines_to_the_whole():
    torch.manual_seed(3)
    logprobs, rollout, mask = torch.randn(40), torch.randn(40), torch.rand(40) < 0.5
    whole = logprob_mismatch(logprobs, rollout, mask)
    parts = [
        logprob_mismatch(logprobs[s], rollout[s], mask[s]) for s in (slice(0, 13), slice(13, 40))
    ]
    torch.testing.assert_close(sum(p.abs_sum for p in parts), whole.abs_sum)
    assert max(p.abs_max.item() for p in parts) == whole.abs_max.item()
    assert sum(p.n_tokens.item() for p in parts) == whole.n_tokens.item() == mask.sum().item()
