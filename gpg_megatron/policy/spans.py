"""Where the segments of a packed row attend: pure functions of the packing.

    row:  | prompt A | response A1 | response A2 | sequence B |

A1 and A2 attend to the whole prompt A and, causally, to themselves; B to itself. Nothing else
crosses a border. Two forms say so: spans, of which each is a batched call, and one call for all of
them, in which every segment is a sequence of its own and keys are gathered:

    queries  | A | A1   | A2   | B |      as they lie
    keys     | A | A A1 | A A2 | B |      a prompt comes again before each of its responses

Under context parallelism a rank has the queries of a part of the row and the keys of all of it. Of
2 * cp equal pieces it holds one from the front and one from the back, so that ranks attend to about
as many tokens (as in arXiv 2407.21783, section 3.3.2).

Shape legend: T tokens of the row, B sequences of queries, M gathered keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch
import torch.nn.functional as F


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Queries of n segments of one length that follow each other and attend to one prompt; or,
    with n = 1, of a piece of a segment."""

    start: int
    """First query, counted among those that this rank holds."""
    key_start: int
    """First position of the first segment in the row."""
    n: int
    length: int
    """Queries of each segment."""
    n_keys: int
    """Positions of a segment up to its last query; more than length where queries are missing
    at its front."""
    prompt: tuple[int, int] | None
    """Positions [begin, end) of the prompt in the row; None: the segments attend to themselves
    only."""


def ranges_of(n_tokens: int, rank: int, size: int) -> tuple[tuple[int, int], ...]:
    """The parts [begin, end) of a row that one of `size` ranks holds; all of it for size 1."""
    if size == 1:
        return ((0, n_tokens),)
    piece, rest = divmod(n_tokens, 2 * size)
    assert rest == 0, f"{n_tokens} tokens for {size} context-parallel ranks"
    return tuple((i * piece, (i + 1) * piece) for i in (rank, 2 * size - 1 - rank))


def spans_of(
    cu_seqlens: Sequence[int],
    prompts: Sequence[int],
    ranges: Sequence[tuple[int, int]] | None = None,
) -> tuple[Span, ...]:
    """The spans of a row, or of the parts of it that a rank holds.

    Args:
        cu_seqlens: [S+1] borders of the segments.
        prompts: [S] the segment that holds the prompt of each segment, -1: none.
        ranges: positions [begin, end) of the rank's queries; None: the whole row.
    """
    bounds = list(zip(cu_seqlens[:-1], cu_seqlens[1:], strict=True))
    pieces, held = [], 0
    for number, (first, last) in enumerate(ranges or ((0, cu_seqlens[-1]),)):
        for (start, end), prompt in zip(bounds, prompts, strict=True):
            begin, stop = max(start, first), min(end, last)
            if begin >= stop:
                continue
            whole = begin == start and stop == end
            span = Span(
                start=held,
                key_start=start,
                n=1,
                length=stop - begin,
                n_keys=stop - start,
                prompt=bounds[prompt] if prompt >= 0 else None,
            )
            pieces.append((span, (number, whole or held, span.length, span.prompt)))
            held += span.length
    runs = [[span for span, _ in run] for _, run in groupby(pieces, key=lambda piece: piece[1])]
    return tuple(replace(run[0], n=len(run)) for run in runs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Varlen:
    """All spans as one call over sequences of any length. In a sequence with q queries and k keys
    query i sees the keys up to k - q + i: the mask is causal at the lower right corner. A sliding
    window counts back from there, since the keys are consecutive positions of one sequence."""

    cu_q_B1: torch.Tensor
    """int32 [B+1], borders of the sequences among the queries that this rank holds."""
    cu_k_B1: torch.Tensor
    """int32 [B+1], the same among the keys."""
    max_q: int
    """Queries of the longest sequence."""
    max_k: int
    keys_M: torch.Tensor | None
    """int64 [M], the position in the row of each key; None: the keys lie as they are needed."""
    copies_M: torch.Tensor
    """int64 [M], 0 to M - 1, by the position that they are copies of."""
    first_copy_T1: torch.Tensor
    """int64 [T+1]; those of position t are copies_M[first_copy[t] : first_copy[t + 1]]."""


def varlen_of(spans: Sequence[Span], n_tokens: int) -> Varlen:
    """The one call of a rank's spans, on the CPU.

    Args:
        n_tokens: T; positions that no span attends to have no copies.
    """
    n_q, n_k = [], []
    pieces: list[tuple[int, int]] = []
    for span in spans:
        prompt = [span.prompt] if span.prompt is not None else []
        for begin in range(span.key_start, span.key_start + span.n * span.n_keys, span.n_keys):
            own = [*prompt, (begin, begin + span.n_keys)]
            pieces += own
            n_q.append(span.length)
            n_k.append(sum(stop - start for start, stop in own))
    begin_P, stop_P = torch.tensor(pieces, dtype=torch.int64).unbind(1)
    length_P = stop_P - begin_P
    before_P = length_P.cumsum(0) - length_P
    keys_M = torch.arange(sum(n_k)) + (begin_P - before_P).repeat_interleave(length_P)
    as_they_lie = torch.equal(keys_M, torch.arange(n_tokens))
    return Varlen(
        cu_q_B1=_borders(n_q),
        cu_k_B1=_borders(n_k),
        max_q=max(n_q),
        max_k=max(n_k),
        keys_M=None if as_they_lie else keys_M,
        copies_M=keys_M.argsort(stable=True),
        first_copy_T1=F.pad(keys_M.bincount(minlength=n_tokens).cumsum(0), (1, 0)),
    )


def _borders(lengths: Sequence[int]) -> torch.Tensor:
    """int32 [B+1] of [B] lengths."""
    return F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()
