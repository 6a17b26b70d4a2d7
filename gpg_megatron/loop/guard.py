"""What ends a run that goes wrong: engines that disagree with the policy, bad updates."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from gpg_megatron.batching.updates import pack, split_updates
from gpg_megatron.errors import RunError
from gpg_megatron.loop.agreement import canary_sample, check_canary, check_mismatch
from gpg_megatron.types import Completion, MicroBatch, Prompt, StepResult, TrainSample


class TooManyBadSteps(RunError):
    """trainer.max_bad_steps optimizer steps in a row were skipped as not finite."""

    everywhere = True


class Guard:
    """Judges every step. Its verdicts are the same on every rank."""

    def __init__(
        self,
        *,
        mismatch_limit: float,
        judges_steps: bool,
        max_bad_steps: int,
        samples_file: Path,
        say: Callable[[str], None],
        is_rank0: bool,
    ) -> None:
        """
        Args:
            mismatch_limit: of log-probs of engines and policy, nats.
            judges_steps: the rollouts of every step are held against it, not only the canary's.
            max_bad_steps: so many in a row end the run, at least 1.
            samples_file: where their samples are written.
            say: prints a line, where this rank is to print any.
            is_rank0: this rank writes the file.
        """
        self.mismatch_limit = mismatch_limit
        self._judges_steps = judges_steps
        self._bad_steps = BadSteps(max_bad_steps)
        self._samples_file = samples_file
        self._say = say
        self._is_rank0 = is_rank0

    def check_canary(
        self,
        pairs: Sequence[tuple[Prompt, Completion]],
        logprobs: Callable[[Sequence[MicroBatch]], list[torch.Tensor]],
    ) -> float:
        """The largest difference of log-probs on the engines' first samples, nats.

        Args:
            logprobs: those of the policy. Collective; every rank computes all of the samples.

        Raises:
            MismatchError
        """
        batch = pack([canary_sample(p, c) for p, c in pairs], [1.0] * len(pairs))
        (values,) = logprobs([batch])
        return check_canary(pairs, batch, values, self.mismatch_limit)

    def check(
        self, step: int, samples: Sequence[TrainSample], results: Sequence[StepResult]
    ) -> None:
        """
        Args:
            samples: of the rollout batch.
            results: of its updates, in order.

        Raises:
            TooManyBadSteps, MismatchError
        """
        self._check_finite(step, samples, results)
        # Later updates are of other weights than those that sampled.
        version = results[0].version - results[0].updated
        if self._judges_steps and all(sample.version == version for sample in samples):
            check_mismatch(step, results[0], self.mismatch_limit)

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
        with path.open("w", encoding="utf-8") as file:
            for row in self._rows:
                file.write(json.dumps(row) + "\n")


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
