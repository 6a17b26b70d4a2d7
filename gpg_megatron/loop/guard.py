"""What ends a run that goes wrong: engines that disagree with the policy, bad updates."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from gpg_megatron.batching.updates import pack, split_updates
from gpg_megatron.errors import RunError, writing
from gpg_megatron.loop.agreement import (
    Distance,
    Limit,
    MismatchError,
    canary_sample,
    distance,
    judge,
    measured_limit,
    step_distance,
    worst_token,
)
from gpg_megatron.policy.policy import Policy
from gpg_megatron.types import Completion, MicroBatch, Prompt, StepResult, TrainSample

ROUNDING_SEEDS = (1, 2)
"""Each costs a forward pass of the canary."""
STALE_STEPS = 10
"""Between two canaries of a run whose engines draw ahead: each has to wait for them, which took
more than half of a step of the demo."""
FEW_TOKENS = 64
"""Fewer say too little to end a run: those of one prompt are off together, in bf16 by 0.1 nats in
the mean of twelve."""


class TooManyBadSteps(RunError):
    """trainer.max_bad_steps optimizer steps in a row were skipped as not finite."""

    everywhere = True


class Guard:
    """Judges every step. Its verdicts are the same on every rank."""

    def __init__(
        self,
        *,
        tolerance: float | None,
        coarser: torch.dtype,
        judges_rollouts: bool,
        draws_ahead: bool,
        max_bad_steps: int,
        samples_file: Path,
        say: Callable[[str], None],
        is_rank0: bool,
    ) -> None:
        """
        Args:
            tolerance: mean difference of log-probs of engines and policy, nats; None: measured.
            coarser: of the types that engines and policy compute in.
            judges_rollouts: the engines' log-probs of what is trained on are comparable.
            draws_ahead: the engines are busy after a step, too.
            max_bad_steps: so many in a row end the run, at least 1.
            samples_file: where their samples are written.
            say: prints a line, where this rank is to print any.
            is_rank0: this rank writes the file.
        """
        self.limit = Limit(floor=0.0 if tolerance is None else tolerance, slope=0.0)
        self._is_measured = tolerance is None
        self._coarser = coarser
        self._judges_rollouts = judges_rollouts
        self._draws_ahead = draws_ahead
        self._bad_steps = BadSteps(max_bad_steps)
        self._samples_file = samples_file
        self._say = say
        self._is_rank0 = is_rank0

    def measure(self, pairs: Sequence[tuple[Prompt, Completion]], policy: Policy) -> None:
        """Set the limit of this model, unless the user did. Collective.

        Args:
            pairs: samples of the engines; only which tokens they are counts.
        """
        if not self._is_measured:
            return
        batches = _rows(pairs)
        own = torch.cat(policy.logprobs(batches))
        others = [
            torch.cat(policy.rounded_logprobs(batches, self._coarser, seed))
            for seed in ROUNDING_SEEDS
        ]
        self.limit = measured_limit(own, others)

    def check_canary(
        self, when: str, pairs: Sequence[tuple[Prompt, Completion]], policy: Policy
    ) -> Distance:
        """Hold samples that the engines just made against the policy's log-probs; how far they
        are apart. Collective: every rank computes all of them.

        Raises:
            MismatchError
        """
        batches = _rows(pairs)
        engine, own = _engine_logprobs(batches), torch.cat(policy.logprobs(batches))
        found = distance(engine, own)
        judge(found, self.limit, when, worst_token(pairs, (own - engine).abs()))
        return found

    def check(
        self, step: int, samples: Sequence[TrainSample], results: Sequence[StepResult]
    ) -> bool:
        """
        Args:
            samples: of the rollout batch.
            results: of its updates, in order.

        Returns:
            whether nothing is left to show; otherwise the canary has to show that engines and
            policy agree. Where engines draw ahead that is every tenth step. A few tokens that are
            too far apart in the mean are left to it, too.

        Raises:
            TooManyBadSteps, MismatchError
        """
        self._check_finite(step, samples, results)
        # Later updates are of other weights than those that sampled.
        version = results[0].version - results[0].updated
        found = step_distance(results[0].metrics)
        is_fresh = all(sample.version == version for sample in samples)
        if self._draws_ahead and not is_fresh and step % STALE_STEPS:
            return True  # the engines are busy; until then the bridge's checksums have to do
        if found is None or not self._judges_rollouts or not is_fresh:
            return False
        try:
            judge(found, self.limit, f"step {step}, rollouts of the present weights")
        except MismatchError:
            few = _n_trained(split_updates(samples, len(results))[0]) < FEW_TOKENS
            if few and found.largest <= self.limit.far:
                return False
            raise
        return True

    def _check_finite(
        self, step: int, samples: Sequence[TrainSample], results: Sequence[StepResult]
    ) -> None:
        self._bad_steps.see(step, split_updates(samples, len(results)), results)
        for result in filter(lambda r: r.is_bad, results):
            self._say(
                f"step {step}: update skipped, loss {result.loss:g}, gradient norm "
                f"{result.grad_norm:g}"
            )
        if not self._bad_steps.are_too_many:
            return
        if self._is_rank0:
            self._bad_steps.write(self._samples_file)
        raise TooManyBadSteps(
            f"step {step}: {self._bad_steps.limit} updates in a row (trainer.max_bad_steps) had a "
            f"loss or gradient that is not finite; their samples are in {self._samples_file}"
        )


class BadSteps:
    """Counts over the run. An update that is made ends a row; one without a gradient does not."""

    def __init__(self, limit: int) -> None:
        """limit: bad steps in a row that end the run, at least 1."""
        self.limit = limit
        self._in_a_row = 0
        self._rows: list[dict[str, Any]] = []

    def see(
        self, step: int, updates: Sequence[Sequence[TrainSample]], results: Sequence[StepResult]
    ) -> None:
        """Count the optimizer steps of one rollout batch.

        Args:
            step: of the loop, from 1.
            updates: the samples of each optimizer step.
            results: what each of them did.
        """
        for number, (samples, result) in enumerate(zip(updates, results, strict=True), start=1):
            if result.updated:
                self._in_a_row = 0
                self._rows.clear()
            elif result.is_bad:
                self._in_a_row += 1
                self._rows += [_row(step, number, sample, result) for sample in samples]

    @property
    def are_too_many(self) -> bool:
        """Whether the run has to end."""
        return self._in_a_row >= self.limit

    def write(self, path: Path) -> None:
        """The samples of the bad steps in a row, one JSON object a line."""
        with writing(path), path.open("w", encoding="utf-8") as file:
            for row in self._rows:
                file.write(json.dumps(row) + "\n")


def _rows(pairs: Sequence[tuple[Prompt, Completion]]) -> list[MicroBatch]:
    """Each in a row of its own, which fits where anything is trained."""
    return [pack([canary_sample(prompt, completion)], [1.0]) for prompt, completion in pairs]


def _n_trained(samples: Sequence[TrainSample]) -> int:
    """Response tokens with a gradient."""
    return sum(len(sample.response_token_ids) for sample in samples if sample.live)


def _engine_logprobs(batches: Sequence[MicroBatch]) -> torch.Tensor:
    return torch.cat([batch.rollout_logprobs_T[batch.loss_mask_T] for batch in batches])


def _row(step: int, update: int, sample: TrainSample, result: StepResult) -> dict[str, Any]:
    return {
        "step": step,
        "update": update,
        "loss": str(result.loss),
        "grad_norm": str(result.grad_norm),
        "prompt_id": sample.prompt_id,
        "group": sample.group,
        "index": sample.index,
        "advantage": sample.advantage,
        "version": sample.version,
        "length": len(sample.response_token_ids),
    }
