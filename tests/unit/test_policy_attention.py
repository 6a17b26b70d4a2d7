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

from gpg_megatron.policy.attention import (
    LossPositions,
    PackedAttention,
    SegmentParams,
    attend_at_once,
    flash_takes,
)
from gpg_megatron.policy.spans import Varlen, ranges_of, spans_of, varlen_of

HEADS, KV_HEADS, SIZE = 4, 2, 8


def direct(tensors: Sequence[torch.Tensor], visible: torch.Tensor) -> torch.Tensor:
    """float64 softmax attention of the whole row; visible[i, j]: i attends to j."""
    query, *others = tensors
    key, value = (x.repeat_interleave(HEADS // KV_HEADS, dim=1) for x in others)
    scores = torch.einsum("ihd,jhd->hij", query, key) / math.sqrt(SIZE)
    probabilities = scores.masked_fill(~visible, -math.inf).softmax(-1)
    return torch.einsum("hij,jhd->ihd", probabilities, value).flatten(1)


def attend(
    tensors: Sequence[torch.Tensor],
    cu_seqlens: list[int],
    prompts: list[int],
    ranges: Sequence[tuple[int, int]] | None = None,
    window: int | None = None,
) -> torch.Tensor:
    """[Tq, 1, heads * d] from query [Tq, heads, d], key and value [T, heads, d]."""
    size = None if window is None else (window - 1, 0)
    # The rest of what it is made of makes no difference.
    attention = PackedAttention(
        TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1, window_size=size)
    )
    query, key, value = (x.unsqueeze(1) for x in tensors)
    params = params_of(spans=spans_of(cu_seqlens, prompts, ranges))
    return attention.forward(query, key, value, None, packed_seq_params=params)


def params_of(**fields: Any) -> SegmentParams:
    none = torch.zeros(0, dtype=torch.int64)
    loss = LossPositions(row_N=none, own_N=none, labels_N=none)
    return SegmentParams(**{"varlen": None, "share": None, "loss": loss} | fields)


def visibility(
    cu_seqlens: list[int], prompts: list[int], window: int | None = None
) -> torch.Tensor:
    n = cu_seqlens[-1]
    visible = torch.zeros(n, n, dtype=torch.bool)
    for s, prompt in enumerate(prompts):
        before = list(range(cu_seqlens[prompt], cu_seqlens[prompt + 1])) if prompt >= 0 else []
        for i in range(cu_seqlens[s], cu_seqlens[s + 1]):
            sequence = [*before, *range(cu_seqlens[s], i + 1)]
            visible[i, sequence[-(window or n) :]] = True
    return visible


WINDOWS = st.none() | st.integers(1, 12)


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


@given(rows(), WINDOWS)
@settings(max_examples=80)
def test_outputs_and_gradients(row: tuple[list[int], list[int]], window: int | None) -> None:
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
    out = attend(ours, cu_seqlens, prompts, window=window)
    expected = direct(right, visibility(cu_seqlens, prompts, window))
    assert out.shape == (n, 1, HEADS * SIZE)
    torch.testing.assert_close(out.squeeze(1), expected)
    (out.squeeze(1) * weight).sum().backward()
    (expected * weight).sum().backward()
    for a, b in zip(ours, right, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def in_plain_torch(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    varlen: Varlen,
    window: int | None,
) -> torch.Tensor:
    """What FlashAttention-2 computes: each sequence alone, causal at the lower right corner."""
    assert (
        varlen.max_q == varlen.cu_q_B1.diff().max() and varlen.max_k == varlen.cu_k_B1.diff().max()
    )
    out = []
    for n_q, n_k, sequence in zip(
        varlen.cu_q_B1.diff().tolist(),
        varlen.cu_k_B1.diff().tolist(),
        zip(
            query.split(varlen.cu_q_B1.diff().tolist()),
            key.split(varlen.cu_k_B1.diff().tolist()),
            value.split(varlen.cu_k_B1.diff().tolist()),
            strict=True,
        ),
        strict=True,
    ):
        visible = torch.ones(n_q, n_k, dtype=torch.bool).tril(n_k - n_q)
        visible = visible.triu(n_k - n_q - (window or n_k) + 1)
        out.append(direct(sequence, visible).unflatten(1, (HEADS, SIZE)))
    return torch.cat(out)


@given(rows(), st.booleans(), st.integers(0, 1), WINDOWS)
@settings(max_examples=80)
def test_one_call_equals_the_call_for_each_span(
    row: tuple[list[int], list[int]], parallel: bool, rank: int, window: int | None
) -> None:
    """Forward and backward, for the whole row and for a context-parallel rank's part of it."""
    cu_seqlens, prompts = row
    ranges = None
    if parallel:
        cu_seqlens, prompts = filled(cu_seqlens, prompts, 4)
        ranges = ranges_of(cu_seqlens[-1], rank, 2)
    n = cu_seqlens[-1]
    n_own = sum(b - a for a, b in ranges or ((0, n),))
    generator = torch.Generator().manual_seed(n)
    tensors = [
        torch.randn(m, heads, SIZE, generator=generator, dtype=torch.float64)
        for m, heads in ((n_own, HEADS), (n, KV_HEADS), (n, KV_HEADS))
    ]
    weight = torch.randn(n_own, HEADS * SIZE, generator=generator, dtype=torch.float64)
    one, loop = ([x.clone().requires_grad_() for x in tensors] for _ in range(2))
    varlen = varlen_of(spans_of(cu_seqlens, prompts, ranges), n)
    query, key, value = one
    out = attend_at_once(query, key, value, varlen, window, kernel=in_plain_torch).flatten(1)
    expected = attend(loop, cu_seqlens, prompts, ranges, window).squeeze(1)
    torch.testing.assert_close(out, expected)
    (out * weight).sum().backward()
    (expected * weight).sum().backward()
    for a, b in zip(one, loop, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def filled(cu_seqlens: list[int], prompts: list[int], multiple: int) -> tuple[list[int], list[int]]:
    """The row with a last segment that fills it up."""
    n_filler = -cu_seqlens[-1] % multiple
    if not n_filler:
        return cu_seqlens, prompts
    return [*cu_seqlens, cu_seqlens[-1] + n_filler], [*prompts, -1]


def test_where_flash_is_used() -> None:
    assert flash_takes("cuda", torch.bfloat16, 128)
    assert not flash_takes("cpu", torch.bfloat16, 128)
    assert not flash_takes("cuda", torch.float32, 128)
    assert not flash_takes("cuda", torch.bfloat16, 100)
    assert not flash_takes("cuda", torch.bfloat16, 512)


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
