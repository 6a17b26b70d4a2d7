"""Training samples to packed micro-batches, balanced over data-parallel ranks.

    rollout batch -> updates (whole groups) -> alpha and weights (algorithm/update.py)
                  -> drop samples without gradient -> plan (planning.py) -> pack

Everything is pure and deterministic: each rank computes the same grid and takes its own row,
so no rank has to be told what to do.

Shape legend: L response tokens of a sample, T packed tokens of a micro-batch, S its segments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from gpg_megatron.algorithm.advantages import alpha
from gpg_megatron.algorithm.update import weigh_update
from gpg_megatron.batching.planning import plan_grid, run_cost, run_tokens, shared_runs
from gpg_megatron.config.algorithm import AlgorithmConfig
from gpg_megatron.model.flops import TokenCosts
from gpg_megatron.types import (
    NO_ROUTING,
    UNROUTED,
    Experts,
    MicroBatch,
    Tokens,
    TrainBatch,
    TrainSample,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchPlan:
    """How every rollout batch of a run is cut up, and which part of it is this rank's."""

    algorithm: AlgorithmConfig
    n_updates: int
    """Optimizer steps for each rollout batch."""
    max_tokens: int
    """Budget of a micro-batch, in packed tokens."""
    max_response_length: int
    """Tokens."""
    dp_rank: int
    """0 .. dp_size - 1, whose part it is."""
    dp_size: int
    """Data-parallel ranks."""
    costs: TokenCosts
    """Of the model; what ranks and micro-batches are balanced by."""
    share_prompts: bool
    """Neighbours with the same prompt compute it once; the policy's attention has to know it."""

    def __post_init__(self) -> None:
        assert 0 <= self.dp_rank < self.dp_size, (self.dp_rank, self.dp_size)


def make_batches(
    samples: Sequence[TrainSample], plan: BatchPlan, *, skipped: bool = False
) -> list[TrainBatch]:
    """One TrainBatch for each optimizer step of a rollout batch.

    The groups, in order of their index, are divided among plan.n_updates updates, as evenly as
    they can be, the earlier ones taking one more; a group is never split. Fewer groups than
    updates: one group each.

    Args:
        samples: all samples of the rollout batch, zero advantages included.
        skipped: no update is to be made: the batches have nothing to compute.
    """
    updates, a = split_updates(samples, plan.n_updates), plan.algorithm
    factor = alpha(samples, a.alpha, a.alpha_max) if a.alpha_scope == "batch" else 1.0
    return [make_update(update, plan, skipped=skipped, batch_alpha=factor) for update in updates]


def split_updates(samples: Sequence[TrainSample], n_updates: int) -> list[list[TrainSample]]:
    """Divide samples into at most n_updates runs of whole groups, as evenly as groups allow."""
    groups: dict[int, list[TrainSample]] = {}
    for sample in sorted(samples, key=lambda s: (s.group, s.index)):
        groups.setdefault(sample.group, []).append(sample)
    ordered = list(groups.values())
    n_updates = min(n_updates, len(ordered))
    updates, start = [], 0
    for i in range(n_updates):
        end = start + len(ordered) // n_updates + (i < len(ordered) % n_updates)
        updates.append([sample for group in ordered[start:end] for sample in group])
        start = end
    return updates


def make_update(
    samples: Sequence[TrainSample],
    plan: BatchPlan,
    *,
    skipped: bool = False,
    batch_alpha: float = 1.0,
) -> TrainBatch:
    """The part of one rank in one optimizer step over samples.

    alpha and weights are counted over all samples; those with zero advantage or an empty
    response are then dropped, since they add exactly nothing to the gradient. When the loss has
    more terms than the policy gradient, only empty responses are dropped. Every rank gets the
    same number of micro-batches, none where no sample is left. A rank that runs out of samples
    gets fillers: a single token with a False mask, there so that collectives match.
    batch_alpha is that of the rollout batch.
    """
    weighed = weigh_update(
        samples,
        plan.algorithm,
        dp_size=plan.dp_size,
        max_tokens=plan.max_tokens,
        max_response_length=plan.max_response_length,
    )
    kept = () if skipped else enumerate(weighed.samples)
    computed = [i for i, sample in kept if _has_gradient(sample, plan)]
    chosen = [weighed.samples[i] for i in computed]
    weights = [weighed.weights[i] for i in computed]
    share, costs = plan.share_prompts, plan.costs
    grid = plan_grid(
        chosen, dp_size=plan.dp_size, max_tokens=plan.max_tokens, costs=costs, share=share
    )
    cells = [[chosen[i] for i in cell] for row in grid for cell in row]
    runs = [run for cell in cells for run in shared_runs(cell, share=share)]
    n_fillers = sum(not cell for cell in cells)
    n_chosen_tokens = sum(map(_n_tokens, chosen))
    n_packed_tokens = sum(map(run_tokens, runs))
    return TrainBatch(
        micro_batches=PackedOnDemand(
            [
                partial(
                    pack,
                    [chosen[i] for i in cell] or [_filler(chosen[0])],
                    [weights[i] for i in cell] or [0.0],
                    share_prompts=share,
                )
                for cell in grid[plan.dp_rank]
            ]
        ),
        n_computed_tokens=n_packed_tokens + n_fillers,
        n_skipped_tokens=sum(map(_n_tokens, samples)) - n_chosen_tokens,
        n_shared_tokens=n_chosen_tokens - n_packed_tokens,
        n_loss_tokens=sum(len(sample.response_token_ids) for sample in chosen),
        unrouted=_unrouted(runs),
        flops=sum(run_cost(run, costs) for run in runs),
        alpha=weighed.alpha,
        whole_alpha=batch_alpha * weighed.alpha,
    )


class PackedOnDemand(Sequence[MicroBatch]):
    """Micro-batches that are packed anew whenever they are asked for: only one is there at once."""

    def __init__(self, packers: Sequence[Callable[[], MicroBatch]]) -> None:
        self._packers = packers

    def __len__(self) -> int:
        return len(self._packers)

    def __getitem__(self, index: Any) -> Any:
        return self._packers[index]()


def _unrouted(runs: Sequence[Sequence[TrainSample]]) -> float:
    """Nothing depends on the last token of a sequence that is on its own."""
    needed = sum(run_tokens(run) - (len(run) == 1) for run in runs)
    known = sum(
        len(run[0].routing.prompt) + sum(len(sample.routing.response) for sample in run)
        for run in runs
    )
    return 1.0 - known / needed if needed else 0.0


def _has_gradient(sample: TrainSample, plan: BatchPlan) -> bool:
    weighs = sample.advantage != 0.0 or plan.algorithm.needs_every_sample
    return weighs and len(sample.response_token_ids) > 0


def pack(
    samples: Sequence[TrainSample], weights: Sequence[float], *, share_prompts: bool = False
) -> MicroBatch:
    """Lay sequences end to end in one row, without padding.

    Args:
        samples: each with a prompt of at least one token.
        weights: the weight of every response token of each sample.
        share_prompts: neighbours with the same prompt compute it once.

    Returns:
        fields as documented in MicroBatch. The mask is True at the positions that predict a
        response token, from the last token of the prompt to the last but one of the response;
        masked-in positions follow the order of the samples.
    """
    weight_of = iter(weights)
    runs = shared_runs(samples, share=share_prompts)
    row = _Row(sum(map(run_tokens, runs)), _routing_shape(samples))
    for run in runs:
        n_shared = len(run[0].prompt_token_ids) - 1 if len(run) > 1 else 0
        prompt = row.add_prompt(run[0]) if n_shared else -1
        for sample in run:
            row.add_sequence(sample, next(weight_of), n_shared, prompt)
    assert next(weight_of, None) is None, "a weight for each sample"
    return row.finish()


def _routing_shape(samples: Sequence[TrainSample]) -> tuple[int, ...]:
    """Layers, experts per token; zeros where no sample has any."""
    rows = (part for s in samples for part in (s.routing.prompt, s.routing.response) if len(part))
    return next(rows, NO_ROUTING.prompt).shape[1:]


class _Row:
    """The arrays that a MicroBatch is made of, filled from left to right."""

    def __init__(self, n_tokens: int, routing: tuple[int, ...]) -> None:
        """routing: shape of what a token has of it."""
        self._tokens, self._positions, self._labels, self._responses = np.zeros(
            (4, n_tokens), np.int64
        )
        self._advantages, self._weights, self._logprobs = np.zeros((3, n_tokens), np.float32)
        self._mask = np.zeros(n_tokens, np.bool_)
        self._experts = np.full((n_tokens, *routing), UNROUTED, np.int16)
        self._borders = [0]
        self._prompts: list[int] = []
        self._n_samples = 0

    def add_prompt(self, sample: TrainSample) -> int:
        """The segment of a sample's prompt without its last token; returns its number."""
        self._route(self._borders[-1], sample.routing.prompt)
        self._add(sample.prompt_token_ids, first_position=0, prompt=-1)
        return len(self._prompts) - 1

    def add_sequence(self, sample: TrainSample, weight: float, n_shared: int, prompt: int) -> None:
        """A sequence without its first n_shared tokens, which segment `prompt` has.

        Where they are shared, the last token is left out too: nothing depends on it. On its own
        a sequence keeps it, as the engine had it.
        """
        before, response = sample.prompt_token_ids[n_shared:], sample.response_token_ids
        assert len(before), f"prompt {sample.prompt_id!r} has no token to predict from"
        assert len(sample.rollout_logprobs) == len(response), sample.prompt_id
        first = self._borders[-1] + len(before) - 1
        loss = slice(first, first + len(response))
        if not n_shared:
            self._route(self._borders[-1], sample.routing.prompt)
        self._route(first, sample.routing.response)
        self._add(
            np.concatenate((before, response)),
            first_position=n_shared,
            prompt=prompt,
            n_without_label=0 if n_shared else 1,
        )
        self._mask[loss] = True
        self._advantages[loss] = sample.advantage
        self._weights[loss] = weight
        self._logprobs[loss] = sample.rollout_logprobs
        self._responses[loss] = self._n_samples
        self._n_samples += 1

    def _add(
        self, token_ids: Tokens, *, first_position: int, prompt: int, n_without_label: int = 0
    ) -> None:
        begin, n_labels = self._borders[-1], len(token_ids) - 1
        n = n_labels + n_without_label
        self._tokens[begin : begin + n] = token_ids[:n]
        self._labels[begin : begin + n_labels] = token_ids[1:]
        self._positions[begin : begin + n] = np.arange(first_position, first_position + n)
        self._borders.append(begin + n)
        self._prompts.append(prompt)

    def _route(self, first: int, experts: Experts) -> None:
        if len(experts):
            self._experts[first : first + len(experts)] = experts

    def finish(self) -> MicroBatch:
        return MicroBatch(
            input_ids_T=torch.from_numpy(self._tokens),
            position_ids_T=torch.from_numpy(self._positions),
            labels_T=torch.from_numpy(self._labels),
            cu_seqlens_S1=torch.tensor(self._borders, dtype=torch.int32),
            prompt_S=torch.tensor(self._prompts, dtype=torch.int32),
            loss_mask_T=torch.from_numpy(self._mask),
            advantages_T=torch.from_numpy(self._advantages),
            weights_T=torch.from_numpy(self._weights),
            rollout_logprobs_T=torch.from_numpy(self._logprobs),
            responses_T=torch.from_numpy(self._responses),
            experts_T=torch.from_numpy(self._experts),
        )


def _filler(sample: TrainSample) -> TrainSample:
    return replace(
        sample,
        prompt_token_ids=sample.prompt_token_ids[:1],
        response_token_ids=sample.response_token_ids[:0],
        rollout_logprobs=sample.rollout_logprobs[:0],
        routing=NO_ROUTING,
        advantage=0.0,
    )


def _n_tokens(sample: TrainSample) -> int:
    return len(sample.prompt_token_ids) + len(sample.response_token_ids)
