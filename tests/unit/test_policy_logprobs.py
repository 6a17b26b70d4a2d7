"""Chunked log-probs against torch's log_softmax: values, gradients, memory."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from gpg_megatron.host import products
from gpg_megatron.policy.logprobs import VocabShard, vocab_parallel_logprobs

N_HIDDEN = 6


def shard(n_tokens: int, *, chunk_tokens: int = 2, temperature: float = 1.0) -> VocabShard:
    return VocabShard(
        first=0,
        n_tokens=n_tokens,
        temperature=temperature,
        chunk_bytes=4 * n_tokens * chunk_tokens,
        group=None,
    )


def case(
    n: int, n_tokens: int, n_padding: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 * n + n_tokens)
    hidden = torch.randn(n, N_HIDDEN, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(n_tokens + n_padding, N_HIDDEN, generator=generator).to(dtype)
    labels = torch.randint(n_tokens, (n,), generator=generator)
    return hidden, weight.requires_grad_(), labels


def direct(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    n_tokens: int,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    logp = torch.log_softmax(hidden @ weight[:n_tokens].t() / temperature, dim=1)
    return logp.gather(1, labels[:, None]).squeeze(1), -(logp.exp() * logp).sum(1)


def test_two_tokens_by_hand() -> None:
    """Logits 0 and ln 3 at temperature 1: probabilities 1/4 and 3/4."""
    hidden = torch.tensor([[1.0]])
    weight = torch.tensor([[0.0], [math.log(3.0)], [9.0]])  # the last row is padding
    logprobs, entropy = vocab_parallel_logprobs(
        hidden, weight, torch.tensor([1]), shard(2), with_entropy=True
    )
    assert logprobs.tolist() == pytest.approx([math.log(0.75)])
    assert entropy is not None
    assert entropy.tolist() == pytest.approx([0.25 * math.log(4) + 0.75 * math.log(4 / 3)])


@given(
    n=st.integers(0, 9),
    n_tokens=st.integers(1, 13),
    n_padding=st.integers(0, 3),
    chunk_tokens=st.integers(1, 10),
    temperature=st.sampled_from([0.5, 1.0, 1.7]),
    with_entropy=st.booleans(),
)
@settings(max_examples=60)
def test_values_and_gradients(
    n: int, n_tokens: int, n_padding: int, chunk_tokens: int, temperature: float, with_entropy: bool
) -> None:
    hidden, weight, labels = case(n, n_tokens, n_padding)
    right_hidden, right_weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    logprobs, entropy = vocab_parallel_logprobs(
        hidden,
        weight,
        labels,
        shard(n_tokens, chunk_tokens=chunk_tokens, temperature=temperature),
        with_entropy=with_entropy,
    )
    right, right_entropy = direct(right_hidden, right_weight, labels, n_tokens, temperature)
    factor = torch.linspace(-1.0, 2.0, n)
    loss, right_loss = (logprobs * factor).sum(), (right * factor).sum()
    torch.testing.assert_close(logprobs.double(), right, rtol=1e-5, atol=1e-5)
    assert (entropy is not None) == with_entropy
    if entropy is not None:
        torch.testing.assert_close(entropy.double(), right_entropy, rtol=1e-5, atol=1e-5)
        loss, right_loss = loss + 3 * entropy.sum(), right_loss + 3 * right_entropy.sum()
    loss.backward()
    right_loss.backward()
    for ours, theirs in ((hidden, right_hidden), (weight, right_weight)):
        assert ours.grad is not None and theirs.grad is not None
        size = max([1.0, *theirs.grad.abs().flatten().tolist()])
        # A logit of 16 is rounded by 1e-6; 3 / temperature and a weight multiply that by up to 15.
        assert ((ours.grad - theirs.grad).abs() <= 4e-5 * size).all()
    assert weight.grad is not None and not weight.grad[n_tokens:].any()


@pytest.mark.parametrize("has_bf16", [False, True])
def test_bf16_sums_the_chunks_of_the_weight_gradient_in_fp32(
    has_bf16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "_has_bf16_products", lambda: has_bf16)
    hidden, weight, labels = case(64, 11, 1, torch.bfloat16)
    right_hidden, right_weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    logprobs, _ = vocab_parallel_logprobs(
        hidden, weight, labels, shard(11, chunk_tokens=1), with_entropy=False
    )
    assert logprobs.dtype == torch.float32
    logprobs.sum().backward()
    direct(right_hidden, right_weight, labels, 11, 1.0)[0].sum().backward()
    assert hidden.grad is not None and weight.grad is not None and right_weight.grad is not None
    assert (hidden.grad.dtype, weight.grad.dtype) == (torch.bfloat16, torch.bfloat16)
    error = (weight.grad.double() - right_weight.grad).abs().max() / right_weight.grad.abs().max()
    # 64 additions in bf16 would lose several of its 8 bits.
    assert error < 2**-7


def test_a_vocabulary_larger_than_the_chunk_works_token_by_token() -> None:
    hidden, weight, labels = case(3, 12, 0)
    tiny = VocabShard(first=0, n_tokens=12, temperature=1.0, chunk_bytes=1, group=None)
    assert list(tiny.chunks(3)) == [slice(0, 1), slice(1, 2), slice(2, 3)]
    logprobs, _ = vocab_parallel_logprobs(hidden, weight, labels, tiny, with_entropy=False)
    torch.testing.assert_close(logprobs, direct(hidden, weight, labels, 12, 1.0)[0])


@pytest.mark.parametrize(("chunk_tokens", "n_chunks"), [(6, 2), (3, 4)])
def test_all_chunks_but_one_are_computed_again(chunk_tokens: int, n_chunks: int) -> None:
    hidden, weight, labels = case(12, 11, 0)

    def flops(chunk_tokens: int) -> int:
        settings = shard(11, chunk_tokens=chunk_tokens)
        with FlopCounterMode(display=False) as counter:
            logprobs, _ = vocab_parallel_logprobs(
                hidden, weight, labels, settings, with_entropy=False
            )
            logprobs.sum().backward()
        return int(counter.get_total_flops())

    logits = 2 * 12 * 11 * N_HIDDEN
    assert flops(chunk_tokens) - flops(12) == logits * (n_chunks - 1) // n_chunks


def test_a_second_backward_pass_gives_the_same() -> None:
    hidden, weight, labels = case(12, 11, 0)
    logprobs, _ = vocab_parallel_logprobs(
        hidden, weight, labels, shard(11, chunk_tokens=6), with_entropy=False
    )
    once, again = (
        torch.autograd.grad(logprobs.sum(), (hidden, weight), retain_graph=True) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


@pytest.mark.parametrize("embeds_too", [False, True])
def test_where_ddp_sums_gradients_the_projections_is_added_there(embeds_too: bool) -> None:
    """DDP adds autograd's gradient unless the weight is marked, and has to see one; a weight that
    is the embedding too gets that of the embedding."""
    hidden, weight, labels = case(5, 7, 1)
    right = weight.detach().clone().requires_grad_()
    direct(hidden, right, labels, 7, 1.0)[0].sum().backward()
    ddps: Any = weight
    ddps.main_grad, ddps.zero_out_wgrad = torch.ones_like(weight), embeds_too
    ddps.grad_added_to_main_grad = False
    logprobs, _ = vocab_parallel_logprobs(hidden, weight, labels, shard(7), with_entropy=False)
    logprobs.sum().backward()
    assert right.grad is not None
    torch.testing.assert_close(ddps.main_grad, 1 + right.grad)
    assert (weight.grad is None) == embeds_too
    assert ddps.grad_added_to_main_grad is not embeds_too


def peak_bytes(n: int, n_tokens: int, chunk_bytes: int, *, with_entropy: bool = False) -> int:
    """Peak of what torch's allocator gave out in forward and backward, without the inputs and
    the gradients of the weights."""
    hidden = torch.randn(n, 8, requires_grad=True)
    weight = torch.randn(n_tokens, 8, requires_grad=True)
    labels = torch.randint(n_tokens, (n,))
    settings = VocabShard(
        first=0, n_tokens=n_tokens, temperature=1.0, chunk_bytes=chunk_bytes, group=None
    )
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        logprobs, _ = vocab_parallel_logprobs(
            hidden, weight, labels, settings, with_entropy=with_entropy
        )
        logprobs.sum().backward()
    held = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak - 4 * weight.numel()


def test_peak_memory_does_not_grow_with_vocabulary_or_tokens() -> None:
    """256 tokens of 4,096 to 65,536 logits are 4 to 64 MiB; the chunk is 1 MiB."""
    chunk = 2**20
    peaks = [peak_bytes(256, n_tokens, chunk) for n_tokens in (2**12, 2**14, 2**16)]
    peaks.append(peak_bytes(1024, 2**14, chunk))
    assert all(chunk <= peak < 1.3 * chunk for peak in peaks), peaks
    whole = peak_bytes(256, 2**14, 2**30)
    assert whole >= 256 * 2**14 * 4, "the measure sees a matrix that is held as a whole"
    assert peak_bytes(256, 2**14, chunk, with_entropy=True) < 3 * chunk
