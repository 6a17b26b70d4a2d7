"""What the last stage makes of a micro-batch's log-probs, and all ranks' statistics in one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from gpg_megatron.algorithm.objective import MAXIMA, SUMS, Tokens, objective
from gpg_megatron.config.algorithm import AlgorithmConfig
from gpg_megatron.host.device import send
from gpg_megatron.types import MicroBatch

Output = tuple[torch.Tensor, torch.Tensor, Any]
"""What the schedule expects of a micro-batch: loss, token count, and what is handed back."""
OutputFunction = Callable[
    [MicroBatch, torch.Tensor | None, torch.Tensor | None, torch.Tensor], Output
]


def objective_output(
    config: AlgorithmConfig,
    batch: MicroBatch,
    old: torch.Tensor | None,
    reference: torch.Tensor | None,
    output: torch.Tensor,
) -> Output:
    """The loss of one micro-batch and its statistics, from the last stage's output: log-probs
    [N], or log-probs and entropies [2, N]."""
    device = output.device
    logprobs, entropy = output if output.dim() == 2 else (output, None)

    def chosen(values_T: torch.Tensor) -> torch.Tensor:
        return send(values_T[batch.loss_mask_T], device)

    tokens = Tokens(
        advantages=chosen(batch.advantages_T),
        weights=chosen(batch.weights_T),
        rollout=chosen(batch.rollout_logprobs_T),
        responses=chosen(batch.responses_T),
        old=None if old is None else send(old, device),
        reference=None if reference is None else send(reference, device),
    )
    loss, statistics = objective(logprobs, entropy, tokens, config)
    return loss, torch.zeros((), dtype=torch.int, device=device), statistics


def logprob_output(
    batch: MicroBatch,
    old: torch.Tensor | None,
    reference: torch.Tensor | None,
    output: torch.Tensor,
) -> Output:
    """The log-probs of one micro-batch, [N]."""
    logprobs = output[0] if output.dim() == 2 else output
    return logprobs.sum(), torch.zeros((), dtype=torch.int), logprobs


def reduced(outputs: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, float]:
    """The micro-batches' statistics of all ranks in one; each is counted once, on the last
    stage's first tensor-parallel and context-parallel rank."""
    names = (*SUMS, *MAXIMA)
    rows = torch.zeros(1, len(names), dtype=torch.float64)
    if outputs and parallel_state.get_tensor_and_context_parallel_rank() == 0:
        stacked = [torch.stack([row[name] for name in names]) for row in outputs]
        rows = torch.stack(stacked).double().cpu()
    total, largest = rows[:, : len(SUMS)].sum(0), rows[:, len(SUMS) :].amax(0)
    dist.all_reduce(total)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return dict(zip(names, [*total.tolist(), *largest.tolist()], strict=True))
