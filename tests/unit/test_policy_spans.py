"""Who sees whom in a packed row, by hand."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpg_megatron.policy.spans import Span, ranges_of, spans_of, varlen_of


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


def test_one_call_by_hand() -> None:
    # A prompt of 3, responses of 2, 2 and 1, a sequence of 4.
    varlen = varlen_of(spans_of([0, 3, 5, 7, 8, 12], [-1, 0, 0, 0, -1]), 12)
    assert varlen.cu_q_B1.tolist() == [0, 3, 5, 7, 8, 12]
    assert varlen.cu_k_B1.tolist() == [0, 3, 8, 13, 17, 21]
    assert (varlen.max_q, varlen.max_k) == (4, 5)
    assert varlen.keys_M is not None
    assert varlen.keys_M.tolist() == [
        *(0, 1, 2),
        *(0, 1, 2, 3, 4),
        *(0, 1, 2, 5, 6),
        *(0, 1, 2, 7),
        *(8, 9, 10, 11),
    ]
    # Four copies of each token of the prompt, one of every other.
    assert varlen.first_copy_T1.tolist() == [0, 4, 8, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21]
    assert varlen.copies_M[:8].tolist() == [0, 3, 8, 13, 1, 4, 9, 14]


def test_one_call_of_a_part_of_the_row_by_hand() -> None:
    cu_seqlens, prompts = [0, 3, 5, 7, 8, 12, 16], [-1, 0, 0, 0, -1, -1]
    varlen = varlen_of(spans_of(cu_seqlens, prompts, ranges_of(16, 1, 2)), 16)
    assert varlen.cu_q_B1.tolist() == [0, 1, 3, 4, 8]
    assert varlen.cu_k_B1.tolist() == [0, 5, 10, 14, 18]
    assert varlen.keys_M is not None
    assert varlen.keys_M.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 5, 6, 0, 1, 2, 7, 8, 9, 10, 11]
    # The last sequence is the other rank's: no query here sees it.
    assert varlen.first_copy_T1.tolist()[-5:] == [18] * 5


@given(st.lists(st.integers(1, 5), min_size=1, max_size=6))
@settings(max_examples=20)
def test_keys_that_lie_as_they_are_needed_are_not_gathered(lengths: list[int]) -> None:
    cu_seqlens = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    varlen = varlen_of(spans_of(cu_seqlens, [-1] * len(lengths)), cu_seqlens[-1])
    assert varlen.keys_M is None
    assert torch.equal(varlen.cu_q_B1, varlen.cu_k_B1)
    assert varlen.cu_q_B1.tolist() == cu_seqlens
