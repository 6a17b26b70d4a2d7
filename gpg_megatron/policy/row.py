"""A packed micro-batch as the model's keyword arguments."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from megatron.core import parallel_state

from gpg_megatron.host.device import Device, send
from gpg_megatron.policy.attention import (
    LossPositions,
    RowShare,
    SegmentParams,
    own_positions,
    row_order,
)
from gpg_megatron.policy.chunks import chunks_of, sent
from gpg_megatron.policy.spans import Varlen, ranges_of, spans_of, varlen_of
from gpg_megatron.types import UNROUTED, MicroBatch


def forward_arguments(
    batch: MicroBatch,
    device: Device,
    *,
    multiple: int,
    flash: bool,
    kernel: int = 0,
    balance: bool = False,
) -> dict[str, object]:
    """The keyword arguments of PolicyModel.forward for one packed micro-batch. All of it is laid
    out on the host and sent; nothing waits for the device.

    Args:
        multiple: the row is filled up to a multiple of it with a sequence of tokens without
            loss, because sequence and context parallelism divide the tokens among ranks.
        flash: attention is one call for the row; see attention.flash_takes.
        kernel: tokens that the convolution of a gated delta net sees; 0: the model has none.
        balance: routers are to be told which positions are of which response.
    """
    n_filler = -len(batch.input_ids_T) % multiple
    n_tokens = len(batch.input_ids_T) + n_filler
    group = parallel_state.get_context_parallel_group()
    own_T = own_positions(n_tokens, group.rank(), group.size())

    def own_row(values_T: torch.Tensor) -> torch.Tensor:
        return send(F.pad(values_T, (0, n_filler))[own_T].unsqueeze(0), device)

    return {
        "input_ids": own_row(batch.input_ids_T),
        "position_ids": own_row(batch.position_ids_T),
        "attention_mask": None,
        "packed_seq_params": replace(
            _segment_params(batch, device, n_filler, own_T, flash, kernel),
            members_ST=send(_members(batch, n_filler), device) if balance else None,
        ),
    }


def _segment_params(
    batch: MicroBatch,
    device: Device,
    n_filler: int,
    own_T: torch.Tensor,
    flash: bool,
    kernel: int,
) -> SegmentParams:
    """Where the segments and the positions with loss lie."""
    bounds, prompts = batch.cu_seqlens_S1, batch.prompt_S
    if n_filler:
        bounds = F.pad(bounds, (0, 1), value=int(bounds[-1]) + n_filler)
        prompts = F.pad(prompts, (0, 1), value=-1)
    n_tokens, n_positions = int(bounds[-1]), int(batch.position_ids_T.max()) + 1
    group = parallel_state.get_context_parallel_group()
    ranges = ranges_of(n_tokens, group.rank(), group.size())
    spans = spans_of(bounds.tolist(), prompts.tolist(), ranges)
    share = None
    if group.size() > 1:
        share = RowShare(order_T=send(row_order(n_tokens, group.size()), device), group=group)
    return SegmentParams(
        spans=spans,
        varlen=_sent(varlen_of(spans, n_tokens), device) if flash else None,
        share=share,
        chunks=sent(chunks_of(spans, n_tokens, kernel), device) if kernel else None,
        loss=_loss_positions(batch, device, n_filler, own_T),
        experts=_own_experts(batch, device, n_filler, own_T),
        max_seqlen_q=n_positions,
        max_seqlen_kv=n_positions,
    )


def _members(batch: MicroBatch, n_filler: int) -> torch.Tensor:
    """bool [responses, T]: which of them predict a token of which response. Models with experts
    have no context parallelism."""
    (row_N,) = batch.loss_mask_T.nonzero(as_tuple=True)
    responses_N = batch.responses_T[row_N]
    n_responses = int(responses_N.max()) + 1 if len(row_N) else 0
    members_ST = torch.zeros(n_responses, len(batch.input_ids_T) + n_filler, dtype=torch.bool)
    members_ST[responses_N, row_N] = True
    return members_ST


def _loss_positions(
    batch: MicroBatch, device: Device, n_filler: int, own_T: torch.Tensor
) -> LossPositions:
    mask_T = F.pad(batch.loss_mask_T, (0, n_filler))
    (own_N,) = mask_T[own_T].nonzero(as_tuple=True)
    return LossPositions(
        row_N=send(mask_T.nonzero().squeeze(1), device),
        own_N=send(own_N, device),
        labels_N=send(batch.labels_T[own_T[own_N]], device),
    )


def _own_experts(
    batch: MicroBatch, device: Device, n_filler: int, own_T: torch.Tensor
) -> torch.Tensor | None:
    """Models with experts have sequence parallelism wherever they have tensor parallelism."""
    if not batch.experts_T.numel():
        return None
    experts_T = F.pad(batch.experts_T, (0, 0, 0, 0, 0, n_filler), value=UNROUTED)
    shares = own_T.chunk(parallel_state.get_tensor_model_parallel_world_size())
    return send(experts_T[shares[parallel_state.get_tensor_model_parallel_rank()]], device)


def _sent(varlen: Varlen, device: Device) -> Varlen:
    return replace(
        varlen,
        cu_q_B1=send(varlen.cu_q_B1, device),
        cu_k_B1=send(varlen.cu_k_B1, device),
        keys_M=None if varlen.keys_M is None else send(varlen.keys_M, device),
        copies_M=send(varlen.copies_M, device),
        first_copy_T1=send(varlen.first_copy_T1, device),
    )
