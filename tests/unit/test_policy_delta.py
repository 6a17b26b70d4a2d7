"""Gated delta nets over segments with a shared prompt, against each sequence token by token."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from gpg_megatron.policy import chunks as chunks_module
from gpg_megatron.policy.chunks import Chunks, chunks_of
from gpg_megatron.policy.delta import convolve, delta_rule
from gpg_megatron.policy.spans import spans_of

KEY_HEADS, VALUE_HEADS, KEY, VALUE, KERNEL = 2, 3, 4, 5, 4
"""VALUE_HEADS of each key head."""
Row = tuple[list[int], list[int]]
"""(cu_seqlens, prompts)"""


@st.composite
def rows(draw: st.DrawFn) -> Row:
    """A few prompts with responses, and sequences of their own."""
    lengths: list[int] = []
    prompts: list[int] = []
    for _ in range(draw(st.integers(1, 3))):
        prompt = len(lengths)
        n_responses = draw(st.integers(0, 3))
        lengths += draw(
            st.lists(st.integers(1, 9), min_size=n_responses + 1, max_size=n_responses + 1)
        )
        prompts += [-1] + [prompt] * n_responses
    cu_seqlens = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    return cu_seqlens, prompts


def positions(row: Row) -> list[tuple[list[int], int]]:
    """Of each segment: the positions of its sequence, and how many of them are the prompt's."""
    cu_seqlens, prompts = row
    segments = [list(range(a, b)) for a, b in zip(cu_seqlens, cu_seqlens[1:], strict=False)]
    before = [segments[p] if p >= 0 else [] for p in prompts]
    return [(b + own, len(b)) for b, own in zip(before, segments, strict=True)]


def one_by_one(
    row: Row, function: Callable[..., torch.Tensor], tensors: Sequence[torch.Tensor]
) -> torch.Tensor:
    """function of each sequence alone, put together again as the row."""
    outputs = [function(*(x[at] for x in tensors))[n:] for at, n in positions(row)]
    return torch.cat(outputs)


def token_by_token(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, decay: torch.Tensor, rate: torch.Tensor
) -> torch.Tensor:
    """The recurrence as arXiv 2412.06464 states it (equation 10), in the type of its inputs."""
    q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    state = v.new_zeros(KEY_HEADS, VALUE_HEADS, KEY, VALUE)
    outputs = []
    for i in range(len(q)):
        key = k[i].unsqueeze(1).unsqueeze(-1)
        state = state * decay[i].exp()[..., None, None]
        error = v[i] - (state * key).sum(-2)
        state = state + key * (rate[i].unsqueeze(-1) * error).unsqueeze(-2)
        outputs.append((state * q[i].unsqueeze(1).unsqueeze(-1)).sum(-2) / KEY**0.5)
    return torch.stack(outputs).flatten(1, 2)


def inputs(n: int, seed: int) -> list[torch.Tensor]:
    """float64 q, k, v, decay and rate."""
    generator = torch.Generator().manual_seed(seed)
    heads = (KEY_HEADS, VALUE_HEADS)
    shapes = [(KEY_HEADS, KEY)] * 2 + [(*heads, VALUE), heads, heads]
    q, k, v, decay, rate = (
        torch.randn(n, *shape, generator=generator, dtype=torch.float64) for shape in shapes
    )
    return [q, k, v, -F.softplus(decay), rate.sigmoid()]


def cut(row: Row, longest: int) -> Chunks:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks_module, "LONGEST", longest)
        return chunks_of(spans_of(*row), row[0][-1], KERNEL)


def gradients(output: torch.Tensor, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    return list(torch.autograd.grad((output * weights).sum(), tensors))


@settings(max_examples=40, deadline=None)
@given(row=rows(), longest=st.sampled_from([2, 3, 64]), seed=st.integers(0, 99))
def test_chunks_compute_what_the_recurrence_does(row: Row, longest: int, seed: int) -> None:
    """Outputs and gradients, with prompts that are computed once."""
    exact = [x.requires_grad_() for x in inputs(row[0][-1], seed)]
    right = one_by_one(row, token_by_token, exact)
    rounded = [x.detach().float().requires_grad_() for x in exact]
    found = delta_rule(cut(row, longest), *rounded)
    torch.testing.assert_close(found.double(), right, rtol=1e-4, atol=1e-5)
    for mine, theirs in zip(gradients(found, rounded), gradients(right, exact), strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-4)


@settings(max_examples=40, deadline=None)
@given(row=rows(), seed=st.integers(0, 99))
def test_the_convolution_stops_at_borders_and_sees_the_prompt(row: Row, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(row[0][-1], 6, generator=generator, requires_grad=True)
    weight = torch.randn(6, KERNEL, generator=generator, requires_grad=True)

    def alone(own: torch.Tensor) -> torch.Tensor:
        padded = F.conv1d(own.T, weight.unsqueeze(1), padding=KERNEL - 1, groups=6)
        return padded[:, : len(own)].T

    right, found = one_by_one(row, alone, [x]), convolve(x, weight, cut(row, 64))
    torch.testing.assert_close(found, right)
    for mine, theirs in zip(
        gradients(found, [x, weight]), gradients(right, [x, weight]), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_chunks_by_hand() -> None:
    """Prompt A of 3 tokens with responses of 1 and 5, sequence B of 4; chunks of 2."""
    chunks = cut(([0, 3, 4, 9, 13], [-1, 0, 0, -1]), 2)
    none = 13
    assert chunks.row_NC.tolist() == [
        [9, 10], [0, 1], [11, 12], [2, none],  # B and A, round by round
        [4, 5], [3, none], [6, 7], [8, none],
    ]  # fmt: skip
    first, second = chunks.waves
    assert (first.n_active, first.parents) == ((2, 2), None)
    assert second.n_active == (2, 1, 1)
    assert second.parents is not None and second.parents.tolist() == [1, 1]
    assert chunks.place_T.tolist() == [2, 3, 6, 10, 8, 9, 12, 13, 14, 0, 1, 4, 5]
    seen = dict(zip(chunks.border_B.tolist(), chunks.before_KB.T.tolist(), strict=True))
    assert seen[1] == [none, none, 0, 1]
    assert seen[3] == [0, 1, 2, 3] and seen[5] == [1, 2, 4, 5]
    assert 7 not in seen and seen[11] == [none, 9, 10, 11]
