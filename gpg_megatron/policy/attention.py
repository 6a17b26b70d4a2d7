"""Attention over packed segments, some of which share a prompt.

    row:  | prompt A | response A1 | response A2 | sequence B |

A1 and A2 attend to the whole prompt A and, causally, to themselves; B to itself. Nothing else
crosses a border. Segments of one length after one prompt are one batched call: on a CPU that
takes a fifth less time than a call each, and less than half of the whole row under one mask.

Under context parallelism a rank has the queries of a part of the row and gathers the keys and
values of all of it. Of 2 * cp equal pieces it holds one from the front and one from the back, so
that ranks attend to about as many tokens (as in arXiv 2407.21783, section 3.3.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig


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


@dataclass(frozen=True, kw_only=True)
class RowShare:
    """The part of a row that a rank holds under context parallelism."""

    own_T: torch.Tensor
    """int64 [T / cp], positions in the row, in the order in which the rank holds them."""
    order_T: torch.Tensor
    """int64 [T], where each position of the row is found in the parts of all ranks, gathered."""
    group: dist.ProcessGroup

    def gather(self, own: torch.Tensor, *, grads_differ: bool) -> torch.Tensor:
        """[T / cp, ...] of this rank -> [T, ...] of the row. Collective.

        Args:
            grads_differ: the ranks go on in different ways, and their gradients are to be added;
                otherwise they do the same, and each takes its part of the gradient.
        """
        parts: torch.Tensor = gather_from_sequence_parallel_region(
            own.contiguous(), tensor_parallel_output_grad=grads_differ, group=self.group
        )
        return parts[self.order_T]

    def gather_chosen(self, values: torch.Tensor, own_mask_T: torch.Tensor) -> torch.Tensor:
        """Values at the masked-in positions of this rank -> [T] of the row, the same on every
        rank; 0 where the mask is False. Collective."""
        own_T = values.new_zeros(own_mask_T.shape).masked_scatter(own_mask_T, values)
        return self.gather(own_T, grads_differ=False)


@dataclass(kw_only=True)
class SegmentParams(PackedSeqParams):  # type: ignore[misc]  # Megatron has no types
    """What Megatron hands through its layers to PackedAttention.

    With this qkv_format Megatron takes the row for one sequence and applies rotary embeddings
    token by token, from the positions that PolicyModel chose.
    """

    qkv_format: str = "sbhd"
    spans: tuple[Span, ...] = ()
    share: RowShare | None = None
    """None: the rank holds the whole row."""


def ranges_of(n_tokens: int, rank: int, size: int) -> tuple[tuple[int, int], ...]:
    """The parts [begin, end) of a row that one of `size` ranks holds; all of it for size 1."""
    if size == 1:
        return ((0, n_tokens),)
    piece, rest = divmod(n_tokens, 2 * size)
    assert rest == 0, f"{n_tokens} tokens for {size} context-parallel ranks"
    return tuple((i * piece, (i + 1) * piece) for i in (rank, 2 * size - 1 - rank))


def row_share(
    n_tokens: int, group: dist.ProcessGroup, device: torch.device | str
) -> RowShare | None:
    """This rank's part of a row; None when it is alone in its group."""
    size = group.size()
    if size == 1:
        return None
    held = [
        torch.cat([torch.arange(a, b) for a, b in ranges_of(n_tokens, rank, size)])
        for rank in range(size)
    ]
    order_T = torch.cat(held).argsort()
    return RowShare(own_T=held[group.rank()].to(device), order_T=order_T.to(device), group=group)


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


class PackedAttention(torch.nn.Module):
    """Megatron's core attention for SegmentParams, on scaled_dot_product_attention."""

    def __init__(self, config: TransformerConfig, **_: Any) -> None:
        super().__init__()

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: None,
        *,
        packed_seq_params: SegmentParams,
        **_: Any,
    ) -> torch.Tensor:
        """query [T, 1, heads, d], key and value [T, 1, kv heads, d] -> [T, 1, heads * d], of
        the tokens that this rank holds."""
        query, key, value = query[:, 0], key[:, 0], value[:, 0]
        if (share := packed_seq_params.share) is not None:
            key, value = (share.gather(x, grads_differ=True) for x in (key, value))
        parts = [_attend(span, query, key, value) for span in packed_seq_params.spans]
        return torch.cat(parts).flatten(1).unsqueeze(1)


def _attend(
    span: Span, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> torch.Tensor:
    """The outputs [n * length, heads, d] of a span, from the rank's queries and the row's keys."""
    q = _segments(query, span.start, span.n, span.length)
    k, v = (_segments(x, span.key_start, span.n, span.n_keys) for x in (key, value))
    if span.prompt is not None:
        k, v = _after_prompt(span, key, k), _after_prompt(span, value, v)
    mask = None
    if k.shape[2] != q.shape[2]:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
        mask = mask.tril_(k.shape[2] - q.shape[2])
        if q.is_cuda:
            # With a mask and fewer key-value heads CUDA has only the kernel that keeps all scores.
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True
    )
    return out.transpose(1, 2).flatten(0, 1)


def _segments(row: torch.Tensor, start: int, n: int, length: int) -> torch.Tensor:
    """[n, heads, length, d] of a row [T, heads, d]."""
    segments: torch.Tensor = row[start : start + n * length].unflatten(0, (n, length))
    return segments.transpose(1, 2)


def _after_prompt(span: Span, row: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """Keys or values [n, kv heads, prompt + n_keys, d], from the row and those of the span."""
    assert span.prompt is not None
    prompt = row[slice(*span.prompt)].transpose(0, 1)
    return torch.cat([prompt.expand(span.n, *prompt.shape), own], dim=2)
