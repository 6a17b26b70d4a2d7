"""Training samples to packed micro-batches, balanced over data-parallel ranks.

    rollout batch -> updates (whole groups) -> alpha and weights (algorithm/update.py)
                  -> drop samples without gradient -> plan (planning.py) -> pack

Everything is pure and deterministic: each rank computes the same grid and takes its own row,
so no rank has to be told what to do.

Shape legend: L response tokens of a sample, T packed tokens of a micro-batch, S its segments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from gpg_megatron.algorithm.advantages import alpha
from gpg_megatron.algorithm.update import weigh_update
from gpg_megatron.batching.planning import plan_grid, run_cost, run_tokens, shared_runs
from gpg_megatron.config.algorithm import AlgorithmConfig
from gpg_megatron.model.flops import TokenCosts
from gpg_megatron.types import MicroBatch, TrainBatch, TrainSample


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
    runs = [
        run
        for row in grid
        for cell in row
        for run in shared_runs([chosen[i] for i in cell], share=share)
    ]
    n_fillers = sum(not cell for row in grid for cell in row)
    n_chosen_tokens = sum(map(_n_tokens, chosen))
    n_packed_tokens = sum(map(run_tokens, runs))
    return TrainBatch(
        micro_batches=tuple(
            pack(
                [chosen[i] for i in cell] or [_filler(chosen[0])],
                [weights[i] for i in cell] or [0.0],
                share_prompts=share,
            )
            for cell in grid[plan.dp_rank]
        ),
        n_computed_tokens=n_packed_tokens + n_fillers,
        n_skipped_tokens=sum(map(_n_tokens, samples)) - n_chosen_tokens,
        n_shared_tokens=n_chosen_tokens - n_packed_tokens,
        flops=sum(run_cost(run, costs) for run in runs),
        alpha=weighed.alpha,
        whole_alpha=batch_alpha * weighed.alpha,
    )


def _has_gradient(sample: TrainSample, plan: BatchPlan) -> bool:
    weighs = sample.advantage != 0.0 or plan.algorithm.needs_every_sample
    return weighs and bool(sample.response_token_ids)


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
