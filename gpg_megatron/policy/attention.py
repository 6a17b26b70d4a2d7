"""Attention over packed segments, some of which share a prompt; spans.py says who sees whom.

On CUDA in bf16 a layer makes one call of FlashAttention-2 for the whole row. Elsewhere it makes a
call for each span: segments of one length after one prompt. On a CPU that takes a fifth less time
than a call for each segment, and less than half of the whole row under one mask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig

from gpg_megatron.host.device import Device
from gpg_megatron.policy.chunks import Chunks
from gpg_megatron.policy.spans import Span, Varlen, ranges_of


@dataclass(frozen=True, kw_only=True)
class LossPositions:
    """Where a row has loss, as positions: a mask would make the host wait for the device."""

    row_N: torch.Tensor
    """int64 [N], in the row."""
    own_N: torch.Tensor
    """int64 [n], those of this rank, counted among the tokens that it holds; row_N without
    context parallelism."""
    labels_N: torch.Tensor
    """int64 [n], the tokens that this rank's positions predict."""


@dataclass(frozen=True, kw_only=True)
class RowShare:
    """The part of a row that a rank holds under context parallelism."""

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

    def gather_chosen(self, values_n: torch.Tensor, loss: LossPositions) -> torch.Tensor:
        """Values at this rank's positions with loss, [n] -> those at all of the row's, [N], the
        same on every rank. Collective."""
        own_T = values_n.new_zeros(len(self.order_T) // self.group.size())
        row_T = self.gather(own_T.index_copy(0, loss.own_N, values_n), grads_differ=False)
        return row_T.index_select(0, loss.row_N)


@dataclass(kw_only=True)
class SegmentParams(PackedSeqParams):  # type: ignore[misc]  # Megatron has no types
    """What Megatron hands through its layers to PackedAttention and GatedDeltaNet, and PolicyModel
    to itself.

    With this qkv_format Megatron takes the row for one sequence and applies rotary embeddings
    token by token, from the positions that PolicyModel chose.
    """

    qkv_format: str = "sbhd"
    spans: tuple[Span, ...]
    varlen: Varlen | None
    """On the device; None: a call for each span."""
    share: RowShare | None
    """None: the rank holds the whole row."""
    loss: LossPositions
    chunks: Chunks | None = None
    """On the device; None: no layer has a recurrence."""
    members_ST: torch.Tensor | None = None
    """bool, on the device: whether a position predicts a token of a response; None: the balance
    among experts is left alone."""
    experts: torch.Tensor | None = None
    """int16 [tokens of this rank's routers, layers, experts per token], on the device; UNROUTED
    where the routers are to choose; None: everywhere."""


def own_positions(n_tokens: int, rank: int, size: int) -> torch.Tensor:
    """int64 [T / size], of a row, in the order in which the rank holds them; on the CPU."""
    return torch.cat([torch.arange(a, b) for a, b in ranges_of(n_tokens, rank, size)])


def row_order(n_tokens: int, size: int) -> torch.Tensor:
    """int64 [T], where each position of the row is found among those that the ranks hold, one
    rank after the other; on the CPU."""
    return torch.cat([own_positions(n_tokens, rank, size) for rank in range(size)]).argsort()


def flash_takes(device: Device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether torch's FlashAttention-2 computes such heads."""
    return (
        device == "cuda"
        and dtype in (torch.bfloat16, torch.float16)
        and head_dim % 8 == 0
        and head_dim <= 256
    )


class PackedAttention(torch.nn.Module):
    """Megatron's core attention for SegmentParams."""

    def __init__(self, config: TransformerConfig, **_: Any) -> None:
        super().__init__()
        self.window = None if config.window_size is None else config.window_size[0] + 1

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
        params = packed_seq_params
        query, key, value = query[:, 0], key[:, 0], value[:, 0]
        if (share := params.share) is not None:
            key, value = (share.gather(x, grads_differ=True) for x in (key, value))
        if params.varlen is not None:
            out = attend_at_once(query, key, value, params.varlen, self.window)
        else:
            out = attend_by_span(query, key, value, params.spans, self.window)
        return out.flatten(1).unsqueeze(1)


# ---- one call ------------------------------------------------------------------------------

Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Varlen, int | None], torch.Tensor]
"""query [Tq, heads, d], key and value [M, kv heads, d], window -> [Tq, heads, d]."""


def flash(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    varlen: Varlen,
    window: int | None,
) -> torch.Tensor:
    """torch's FlashAttention-2, with fewer key-value heads and with a gradient.

    The public varlen_attn has another signature in every release, and in torch 2.11 not fewer
    key-value heads; this is what it calls, and the arguments here are the same from 2.11 on.
    """
    outputs = torch.ops.aten._flash_attention_forward(
        query, key, value, varlen.cu_q_B1, varlen.cu_k_B1, varlen.max_q, varlen.max_k,
        0.0, True, False,  # no dropout, causal, no mask of the dropout
        window_size_left=None if window is None else window - 1,
        window_size_right=None if window is None else 0,
    )  # fmt: skip
    out: torch.Tensor = outputs[0]
    return out


def attend_at_once(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    varlen: Varlen,
    window: int | None,
    kernel: Kernel = flash,
) -> torch.Tensor:
    """The outputs [Tq, heads, d], from the rank's queries and the row's keys [T, kv heads, d].

    Args:
        window: tokens of its sequence that a token attends to, itself included; None: all before
            it.
    """
    if varlen.keys_M is not None:
        gather: Any = _Gather.apply  # torch has no types for it
        key, value = gather(key, varlen), gather(value, varlen)
    return kernel(query, key, value, varlen, window)


class _Gather(torch.autograd.Function):
    """row[keys], with a gradient that is the same in every run.

    Of the row's position t it is the sum over the copies of t, in their order. The backward pass
    of an index adds them with atomics or sorts the index anew in every layer; the sum over a bag
    of rows, as of embeddings, is one kernel that adds in fp32.
    """

    @staticmethod
    def forward(ctx: Any, row: torch.Tensor, varlen: Varlen) -> torch.Tensor:
        assert varlen.keys_M is not None
        ctx.varlen = varlen
        return row.index_select(0, varlen.keys_M)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        varlen, (grad,) = ctx.varlen, grads
        sums = F.embedding_bag(
            varlen.copies_M,
            grad.flatten(1),
            varlen.first_copy_T1,
            mode="sum",
            include_last_offset=True,
        )
        return sums.unflatten(1, grad.shape[1:]), None


# ---- a call for each span ------------------------------------------------------------------


def attend_by_span(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    spans: Sequence[Span],
    window: int | None,
) -> torch.Tensor:
    """The same, a span after the other."""
    cut: Any = _Cut.apply  # torch has no types for it
    queries = cut(query, tuple((s.start, s.start + s.n * s.length) for s in spans))
    ranges = tuple(r for span in spans for r in _key_ranges(span))
    keys, values = iter(cut(key, ranges)), iter(cut(value, ranges))
    return torch.cat(
        [
            _attend(span, _segments(q, span.n), _keys(span, keys), _keys(span, values), window)
            for span, q in zip(spans, queries, strict=True)
        ]
    )


class _Cut(torch.autograd.Function):
    """Pieces [begin, end) of a row, some of which overlap: views.

    Their gradients are added into one row. The backward pass of a slice makes a whole row of zeros
    for each of them.
    """

    @staticmethod
    def forward(
        ctx: Any, row: torch.Tensor, ranges: Sequence[tuple[int, int]]
    ) -> tuple[torch.Tensor, ...]:
        ctx.ranges, ctx.shape = ranges, row.shape
        return tuple(row[begin:end] for begin, end in ranges)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        out = grads[0].new_zeros(ctx.shape)
        for (begin, end), grad in zip(reversed(ctx.ranges), reversed(grads), strict=True):
            out[begin:end] += grad
        return out, None


def _key_ranges(span: Span) -> list[tuple[int, int]]:
    """Of its own keys, and of its prompt's."""
    own = (span.key_start, span.key_start + span.n * span.n_keys)
    return [own] if span.prompt is None else [own, span.prompt]


def _keys(span: Span, pieces: Iterator[torch.Tensor]) -> torch.Tensor:
    """Keys or values [n, kv heads, prompt + n_keys, d] of a span, from the next pieces."""
    own = _segments(next(pieces), span.n)
    if span.prompt is None:
        return own
    prompt = next(pieces).transpose(0, 1)
    return torch.cat([prompt.expand(span.n, *prompt.shape), own], dim=2)


def _attend(
    span: Span, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None
) -> torch.Tensor:
    """The outputs [n * length, heads, d] of a span."""
    mask = None
    n_before = k.shape[2] - q.shape[2]
    is_cut = window is not None and window < k.shape[2]
    if n_before or is_cut:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
        mask = mask.tril_(n_before)
        if window is not None:
            mask = mask.triu_(n_before - window + 1)
        if q.device.type != "cpu":
            # With a mask and fewer key-value heads CUDA has only the kernel that keeps all scores.
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True
    )
    return out.transpose(1, 2).flatten(0, 1)


def _segments(piece: torch.Tensor, n: int) -> torch.Tensor:
    """[n * length, heads, d] -> [n, heads, length, d]."""
    segments: torch.Tensor = piece.unflatten(0, (n, -1))
    return segments.transpose(1, 2)
