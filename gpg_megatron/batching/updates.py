"""Training samples to packed micro-batches, balanced over data-parallel ranks.

    rollout batch -> updates (whole groups) -> alpha and weights over each update
                  -> drop samples without gradient -> plan (planning.py) -> pack

Everything is pure and deterministic: each rank computes the same grid and takes its own row,
so no rank has to be told what to do.

Shape legend: L response tokens of a sample, T packed tokens of a micro-batch, S its segments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean

import torch

from gpg_megatron.algorithm.advantages import alpha, scaled
from gpg_megatron.algorithm.aggregation import aggregation_weights
from gpg_megatron.algorithm.micro_steps import micro_steps
from gpg_megatron.batching.planning import plan_grid, run_cost, run_tokens, shared_runs
from gpg_megatron.config.algorithm import AlgorithmConfig
from gpg_megatron.model.flops import TokenCosts
from gpg_megatron.types import MicroBatch, TrainBatch, TrainSample


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchPlan:
    """How rollout batches become this rank's part of optimizer steps."""

    algorithm: AlgorithmConfig
    n_updates: int
    max_tokens: int
    max_response_length: int
    dp_rank: int
    dp_size: int
    costs: TokenCosts
    share_prompts: bool


def make_batches(
    samples: Sequence[TrainSample], plan: BatchPlan, *, skipped: bool = False
) -> list[TrainBatch]:
    """One TrainBatch for each optimizer step of a rollout batch."""
    batches = []
    for update in split_updates(samples, plan.n_updates):
        corrected, factor = apply_alpha(
            update, plan.algorithm, dp_size=plan.dp_size, max_tokens=plan.max_tokens
        )
        batch = make_update(
            corrected,
            aggregation=plan.algorithm.loss_aggregation,
            max_response_length=plan.max_response_length,
            max_tokens=plan.max_tokens,
            dp_rank=plan.dp_rank,
            dp_size=plan.dp_size,
            every_sample=plan.algorithm.needs_every_sample,
            costs=plan.costs,
            share_prompts=plan.share_prompts,
        )
        batches.append(replace(batch, alpha=factor))
    return list(map(left_out, batches)) if skipped else batches


def apply_alpha(
    samples: Sequence[TrainSample], algorithm: AlgorithmConfig, *, dp_size: int, max_tokens: int
) -> tuple[list[TrainSample], float]:
    """The samples of an update with the alpha of their mini-batch or micro-step.

    Returns:
        the samples, as they are where alpha counts over the rollout batch, and the factor: the
        mean of those that are not 0, where there are several.
    """
    if algorithm.alpha_scope == "batch":
        return list(samples), 1.0
    scopes = [list(range(len(samples)))]
    if algorithm.alpha_scope == "micro-batch":
        steps = micro_steps(samples, dp_size, max_tokens)
        scopes = [[i for cell in step for i in cell] for step in steps]
    corrected, factors = list(samples), []
    for scope in scopes:
        members = [samples[i] for i in scope]
        factors.append(alpha(members, algorithm.alpha, algorithm.alpha_max))
        for i in scope:
            corrected[i] = scaled(samples[i], factors[-1])
    return corrected, fmean([factor for factor in factors if factor] or [0.0])


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
    *,
    aggregation: str,
    max_response_length: int,
    max_tokens: int,
    dp_rank: int,
    dp_size: int,
    costs: TokenCosts,
    share_prompts: bool,
    every_sample: bool = False,
) -> TrainBatch:
    """The part of rank dp_rank in one optimizer step over samples.

    Weights are counted over all samples; those with zero advantage or an empty response are
    then dropped, since they add exactly nothing to the gradient. With every_sample, when the
    loss has more terms than the policy gradient, only empty responses are dropped. Every rank
    gets the same number of micro-batches, none where no sample is left. A rank that runs out of
    samples gets fillers: a single token with a False mask, there so that collectives match.
    """
    cells: list[list[int]] = []
    if aggregation == "micro-batch-token-mean":
        cells = [cell for step in micro_steps(samples, dp_size, max_tokens) for cell in step]
    weights = aggregation_weights(samples, aggregation, max_response_length, cells)
    live = [
        i
        for i, s in enumerate(samples)
        if s.response_token_ids and (every_sample or s.advantage != 0.0)
    ]
    chosen, chosen_weights = [samples[i] for i in live], [weights[i] for i in live]
    grid = plan_grid(
        chosen, dp_size=dp_size, max_tokens=max_tokens, costs=costs, share=share_prompts
    )
    runs = [
        run
        for row in grid
        for cell in row
        for run in shared_runs([chosen[i] for i in cell], share=share_prompts)
    ]
    n_fillers = sum(not cell for row in grid for cell in row)
    n_live_tokens = sum(map(_n_tokens, chosen))
    n_packed_tokens = sum(map(run_tokens, runs))
    return TrainBatch(
        micro_batches=tuple(
            pack(
                [chosen[i] for i in cell] or [_filler(chosen[0])],
                [chosen_weights[i] for i in cell] or [0.0],
                share_prompts=share_prompts,
            )
            for cell in grid[dp_rank]
        ),
        n_samples=len(samples),
        n_loss_tokens=sum(len(s.response_token_ids) for s in samples),
        n_computed_tokens=n_packed_tokens + n_fillers,
        n_skipped_tokens=sum(map(_n_tokens, samples)) - n_live_tokens,
        n_shared_tokens=n_live_tokens - n_packed_tokens,
        flops=sum(run_cost(run, costs) for run in runs),
    )


def left_out(batch: TrainBatch) -> TrainBatch:
    """The batch of a step that is skipped: the same samples, and nothing to compute."""
    return replace(
        batch,
        micro_batches=(),
        n_computed_tokens=0,
        n_shared_tokens=0,
        n_skipped_tokens=batch.n_skipped_tokens + batch.n_computed_tokens + batch.n_shared_tokens,
        flops=0.0,
    )


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
    row = _Row()
    for run in shared_runs(samples, share=share_prompts):
        n_shared = len(run[0].prompt_token_ids) - 1 if len(run) > 1 else 0
        prompt = row.add_prompt(run[0].prompt_token_ids) if n_shared else -1
        for sample in run:
            row.add_sequence(sample, next(weight_of), n_shared, prompt)
    assert next(weight_of, None) is None, "a weight for each sample"
    return row.finish()


@dataclass(slots=True)
class _Row:
    """The lists that a MicroBatch is made of, element by element."""

    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    mask: list[bool] = field(default_factory=list)
    advantages: list[float] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    responses: list[int] = field(default_factory=list)
    n_samples: int = 0
    cu_seqlens: list[int] = field(default_factory=lambda: [0])
    prompts: list[int] = field(default_factory=list)

    def add_prompt(self, token_ids: Sequence[int]) -> int:
        """The segment of a prompt without its last token; returns its number."""
        n = len(token_ids) - 1
        self._add(token_ids[:-1], token_ids[1:], first_position=0, prompt=-1)
        for values in (self.advantages, self.weights, self.logprobs):
            values += [0.0] * n
        self.responses += [0] * n
        self.mask += [False] * n
        return len(self.prompts) - 1

    def add_sequence(self, sample: TrainSample, weight: float, n_shared: int, prompt: int) -> None:
        """A sequence without its first n_shared tokens, which segment `prompt` has.

        Where they are shared, the last token is left out too: nothing depends on it. On its own
        a sequence keeps it, as the engine had it.
        """
        n_before, n_loss = (
            len(sample.prompt_token_ids) - 1 - n_shared,
            len(sample.response_token_ids),
        )
        assert n_before >= 0, f"prompt {sample.prompt_id!r} has no token to predict from"
        assert len(sample.rollout_logprobs) == n_loss, sample.prompt_id
        sequence = (*sample.prompt_token_ids, *sample.response_token_ids)[n_shared:]
        after = 0 if n_shared else 1
        tokens, labels = (sequence, (*sequence[1:], 0)) if after else (sequence[:-1], sequence[1:])
        self._add(tokens, labels, first_position=n_shared, prompt=prompt)
        self.mask += [False] * n_before + [True] * n_loss + [False] * after
        self.advantages += [0.0] * n_before + [sample.advantage] * n_loss + [0.0] * after
        self.weights += [0.0] * n_before + [weight] * n_loss + [0.0] * after
        self.logprobs += (*[0.0] * n_before, *sample.rollout_logprobs, *[0.0] * after)
        self.responses += [0] * n_before + [self.n_samples] * n_loss + [0] * after
        self.n_samples += 1

    def _add(
        self, tokens: Sequence[int], labels: Sequence[int], *, first_position: int, prompt: int
    ) -> None:
        self.tokens += tokens
        self.positions += range(first_position, first_position + len(tokens))
        self.labels += labels
        self.cu_seqlens.append(len(self.tokens))
        self.prompts.append(prompt)

    def finish(self) -> MicroBatch:
        return MicroBatch(
            input_ids_T=torch.tensor(self.tokens, dtype=torch.int64),
            position_ids_T=torch.tensor(self.positions, dtype=torch.int64),
            labels_T=torch.tensor(self.labels, dtype=torch.int64),
            cu_seqlens_S1=torch.tensor(self.cu_seqlens, dtype=torch.int32),
            prompt_S=torch.tensor(self.prompts, dtype=torch.int32),
            loss_mask_T=torch.tensor(self.mask, dtype=torch.bool),
            advantages_T=torch.tensor(self.advantages, dtype=torch.float32),
            weights_T=torch.tensor(self.weights, dtype=torch.float32),
            rollout_logprobs_T=torch.tensor(self.logprobs, dtype=torch.float32),
            responses_T=torch.tensor(self.responses, dtype=torch.int64),
        )


def _filler(sample: TrainSample) -> TrainSample:
    return replace(
        sample,
        prompt_token_ids=sample.prompt_token_ids[:1],
        response_token_ids=(),
        rollout_logprobs=(),
        advantage=0.0,
    )


def _n_tokens(sample: TrainSample) -> int:
    return len(sample.prompt_token_ids) + len(sample.response_token_ids)
