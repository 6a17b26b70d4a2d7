"""Megatron's schedule over micro-batches: one after the other, 1F1B between pipeline stages, or
interleaved, where a stage has several chunks of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import repeat
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func

from gpg_megatron.policy.outputs import Output, OutputFunction
from gpg_megatron.types import Anchors, MicroBatch

Cell = tuple[MicroBatch, torch.Tensor | None, torch.Tensor | None]
"""A micro-batch, and the old and the reference log-probs of it."""


def run_schedule(
    chunks: Sequence[DistributedDataParallel],
    micro_batches: Sequence[MicroBatch],
    output: OutputFunction,
    *,
    arguments: Callable[[MicroBatch], dict[str, object]],
    anchors: Anchors,
    forward_only: bool,
) -> list[Any]:
    """What `output` hands back of each micro-batch, on the last stage; elsewhere nothing.

    The interleaved schedule takes micro-batches in groups of as many as there are stages: the last
    group is filled up with single tokens without loss.

    Args:
        chunks: this rank's, in the order of their layers.
        arguments: those of the model's forward for a micro-batch.
    """

    def forward_step(
        cells: Iterator[Cell], model: torch.nn.Module
    ) -> tuple[torch.Tensor, Callable[[torch.Tensor], Output]]:
        batch, old, reference = next(cells)
        return model(**arguments(batch)), partial(output, batch, old, reference)

    n = len(micro_batches)
    group = parallel_state.get_pipeline_model_parallel_world_size() if len(chunks) > 1 else 1
    n_fillers = -n % group
    outputs: list[Any] = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[_cells(micro_batches, anchors, n_fillers) for _ in chunks],
        model=list(chunks),
        num_microbatches=n + n_fillers,
        # Only sizes buffers when lengths are fixed; here every micro-batch has its own.
        seq_length=1,
        micro_batch_size=1,
        forward_only=forward_only,
    )
    return outputs[:n]


def _cells(micro_batches: Sequence[MicroBatch], anchors: Anchors, n_fillers: int) -> Iterator[Cell]:
    """Every chunk goes through the micro-batches by itself, and each is packed for it anew."""
    yield from zip(
        micro_batches, anchors.old or repeat(None), anchors.reference or repeat(None), strict=False
    )
    if n_fillers:
        none = torch.empty(0)
        old, reference = (none if kept else None for kept in (anchors.old, anchors.reference))
        yield from repeat((_filler(micro_batches[0]), old, reference), n_fillers)


def _filler(batch: MicroBatch) -> MicroBatch:
    """The first token of a row alone, without loss."""
    one = {name: getattr(batch, name)[:1] for name in MicroBatch.__slots__ if name.endswith("_T")}
    return MicroBatch(
        **one | {"loss_mask_T": torch.zeros(1, dtype=torch.bool)},
        cu_seqlens_S1=torch.tensor([0, 1], dtype=torch.int32),
        prompt_S=torch.tensor([-1], dtype=torch.int32),
    )
