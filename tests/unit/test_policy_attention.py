"""Attention over segments with a shared prompt, against each sequence on its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.transformer.transformer_config import TransformerConfig

from gpg_megatron.policy.attention import PackedAttention, SegmentParams, Span, ranges_of, spans_of

HEADS, KV_HEADS, SIZE = 4, 2, 8


def test_spans_by_hand() -> None:
    # A prompt of 3, responses of 2, 2 and 1; two sequences of 4 that share nothing.
    spans = spans_of([0, 3, 5, 7, 8, 12, 16], [-1, 0, 0, 0, -1, -1])
    assert spans == (
        span(0, 0, 1, 3),
        span(3, 3, 2, 2, prompt=(0, 3)),
        span(7, 7, 1, 1, prompt=(0, 3)),
        span(8, 8, 2, 4),
    )


def test_spans_of_a_part_of_the_row_by_hand() -> None:
    assert ranges_of(16, 0, 2) == ((0, 4), (12, 16))
    assert ranges_of(16, 1, 2) == ((4, 8), (8, 12))
    cu_seqlens, prompts = [0, 3, 5, 7, 8, 12, 16], [-1, 0, 0, 0, -1, -1]
    assert spans_of(cu_seqlens, prompts, ranges_of(16, 0, 2)) == (
        span(0, 0, 1, 3),
        span(3, 3, 1, 1, prompt=(0, 3)),  # the first token of a response of two
        span(4, 12, 1, 4),
    )
    assert spans_of(cu_seqlens, prompts, ranges_of(16, 1, 2)) == (
        span(0, 3, 1, 1, n_keys=2, prompt=(0, 3)),  # its second token
        span(1, 5, 1, 2, prompt=(0, 3)),
        span(3, 7, 1, 1, prompt=(0, 3)),
        span(4, 8, 1, 4),
    )


def span(
    start: int,
    key_start: int,
    n: int,
    length: int,
    *,
    n_keys: int | None = None,
    prompt: tuple[int, int] | None = None,
) -> Span:
    return Span(
        start=start,
        key_start=key_start,
        n=n,
        length=length,
        n_keys=n_keys or length,
        prompt=prompt,
    )


def direct(tensors: Sequence[torch.Tensor], visible: torch.Tensor) -> torch.Tensor:
    """float64 softmax attention of the whole row; visible[i, j]: i attends to j."""
    query, *others = tensors
    key, value = (x.repeat_interleave(HEADS // KV_HEADS, dim=1) for x in others)
    scores = torch.einsum("ihd,jhd->hij", query, key) / math.sqrt(SIZE)
    probabilities = scores.masked_fill(~visible, -math.inf).softmax(-1)
    return torch.einsum("hij,jhd->ihd", probabilities, value).flatten(1)


def attend(
    tensors: Sequence[torch.Tensor], cu_seqlens: list[int], prompts: list[int]
) -> torch.Tensor:
    """[T, 1, heads * d] from query, key and value [T, heads, d]."""
    # What it is made of makes no difference.
    attention = PackedAttention(
        TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
    )
    query, key, value = (x.unsqueeze(1) for x in tensors)
    params = SegmentParams(spans=spans_of(cu_seqlens, prompts))
    return attention.forward(query, key, value, None, packed_seq_params=params)


def visibility(cu_seqlens: list[int], prompts: list[int]) -> torch.Tensor:
    n = cu_seqlens[-1]
    visible = torch.zeros(n, n, dtype=torch.bool)
    for s, prompt in enumerate(prompts):
        for i in range(cu_seqlens[s], cu_seqlens[s + 1]):
            visible[i, cu_seqlens[s] : i + 1] = True
            if prompt >= 0:
                visible[i, cu_seqlens[prompt] : cu_seqlens[prompt + 1]] = True
    return visible


@st.composite
def rows(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """(cu_seqlens, prompts) of a few prompts with responses, and sequences of their own."""
    lengths: list[int] = []
    prompts: list[int] = []
    for _ in range(draw(st.integers(1, 3))):
        lengths.append(draw(st.integers(1, 6)))
        prompts.append(-1)
        first = len(prompts) - 1
        for _ in range(draw(st.integers(0, 4))):
            lengths.append(draw(st.integers(1, 4)))
            prompts.append(first)
    return [sum(lengths[:i]) for i in range(len(lengths) + 1)], prompts


@given(rows())
@settings(max_examples=50)
def test_outputs_and_gradients(row: tuple[list[int], list[int]]) -> None:
    cu_seqlens, prompts = row
    n = cu_seqlens[-1]
    generator = torch.Generator().manual_seed(n)
    tensors = [
        torch.randn(n, heads, SIZE, generator=generator, dtype=torch.float64)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    ]
    weight = torch.randn(n, HEADS * SIZE, generator=generator, dtype=torch.float64)
    ours = [x.clone().requires_grad_() for x in tensors]
    right = [x.clone().requires_grad_() for x in tensors]
    out = attend(ours, cu_seqlens, prompts)
    expected = direct(right, visibility(cu_seqlens, prompts))
    assert out.shape == (n, 1, HEADS * SIZE)
    torch.testing.assert_close(out.squeeze(1), expected)
    (out.squeeze(1) * weight).sum().backward()
    (expected * weight).sum().backward()
    for a, b in zip(ours, right, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_score_matrix_of_the_whole_row_is_made(dtype: torch.dtype) -> None:
    """Beyond inputs and outputs, what is made is smaller than the row's scores."""
    n_prompt, n, length = 300, 6, 50
    cu_seqlens = [0, *(n_prompt + i * length for i in range(n + 1))]
    total = cu_seqlens[-1]
    tensors = [
        torch.randn(total, heads, SIZE, dtype=dtype) for heads in (HEADS, KV_HEADS, KV_HEADS)
    ]
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        attend(tensors, cu_seqlens, [-1, *[0] * n])
    profiler: Any = profile.profiler
    events = profiler.kineto_results.events()
    largest = max(event.nbytes() for event in events if event.name() == "[memory]")
    assert largest < total * total
