"""What rank 0 alone holds: the engines, the scorers, the logs, the held-out prompts."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from gpg_megatron.algorithm.advantages import AdvantageStats
from gpg_megatron.config.off_policy import summary
from gpg_megatron.config.sections import Config
from gpg_megatron.evaluation.evaluate import evaluate
from gpg_megatron.host.leaving import forget_request
from gpg_megatron.loop.collector import sampling_requests
from gpg_megatron.loop.inputs import Inputs
from gpg_megatron.loop.suspect import write_suspect
from gpg_megatron.observe.loggers import RunLogger
from gpg_megatron.observe.metrics import memory_metrics
from gpg_megatron.observe.progress import Progress
from gpg_megatron.observe.report import write_report
from gpg_megatron.observe.rundir import METRICS, read_metrics
from gpg_megatron.observe.summary import summary_lines
from gpg_megatron.reward.pool import RewardPool
from gpg_megatron.rollout.fleet import Fleet
from gpg_megatron.rollout.sampling import canary_params, validation_params
from gpg_megatron.types import Completion, Prompt, ScoredGroup, TrainSample

CANARY_PROMPTS = (8, 16)
"""At least and at most."""
CANARY_SIZE = 256
"""Tokens, where so many prompts have them."""


@dataclass(slots=True, kw_only=True)
class Rank0:
    """Rank 0's side of the loop. Whoever made the parts closes them."""

    config: Config
    inputs: Inputs
    fleet: Fleet
    pool: RewardPool
    logger: RunLogger
    progress: Progress
    pids: Sequence[int]
    """Of the other policy ranks, for the memory metrics."""
    gpu_metrics: Callable[[], dict[str, float]]
    """Since the last call; nothing on CPU."""
    _has_warned: bool = field(default=False, init=False)

    def canary(self) -> list[tuple[Prompt, Completion]]:
        """A few short samples of the engines' weights, to compare with the policy's."""
        rollout = self.config.rollout
        fewest, most = CANARY_PROMPTS
        needed = -(-CANARY_SIZE // canary_params(rollout, seed=0).max_tokens)
        prompts = self.inputs.train_prompts[: min(max(needed, fewest), most)]
        requests = [
            replace(request, params=canary_params(rollout, seed=request.params.seed))
            for request in sampling_requests(self.config, prompts, step=0, redraw=0)
        ]
        return list(zip(prompts, self.fleet.generate(requests), strict=True))

    def evaluate(self, step: int) -> dict[str, float]:
        """Held-out accuracy; {} without validation files. The answers go to eval/step_N.jsonl."""
        if not self.inputs.val_prompts:
            return {}
        trainer, validation = self.config.trainer, self.config.validation
        params = validation_params(validation, self.config.rollout, seed=trainer.seed)
        path = Path(trainer.output_dir) / "eval" / f"step_{step}.jsonl"
        generations = path if validation.save_generations else None
        return evaluate(self.fleet, self.pool, self.inputs.val_prompts, params, generations)

    def message(self, text: str) -> None:
        """One line for the person who watches."""
        self.progress.message(text)

    def say_what_was_decided(self) -> None:
        """How off-policy answers are weighed, and how many training prompts are too long."""
        self.message(summary(self.config.objective, self.config.sampled))
        if n := self.inputs.n_filtered:
            self.message(f"{n} training prompts exceed data.max_prompt_length and are left out")

    def report(
        self,
        step: int,
        metrics: Mapping[str, float],
        groups: Sequence[ScoredGroup] = (),
        samples: Sequence[TrainSample] = (),
    ) -> None:
        """Write one step everywhere; step 0 is the state before training."""
        metrics = {**metrics, **memory_metrics(self.pids, os.getppid()), **self.gpu_metrics()}
        self.logger.log(step, metrics)
        if step:
            self.progress.step(step, metrics)
            self.logger.write_rollouts(step, groups, samples)

    def keep_suspect(self, step: int, groups: Sequence[ScoredGroup]) -> None:
        """Write down a batch with which the run has failed before."""
        write_suspect(self.config.trainer.output_dir, step, groups)

    def warn_of_shaped_scores(self, step: int, stats: AdvantageStats) -> None:
        """Once: the alpha that counts right answers by their score does not here."""
        if self._has_warned or not stats.n_shaped or self.config.algorithm.alpha != "nonzero":
            return
        self._has_warned = True
        print(
            f"warning: step {step}: {stats.n_shaped} of {stats.n_samples} scores are neither 0 "
            "nor 1, but algorithm.alpha=nonzero takes every score other than 0 for a right "
            "answer; algorithm.alpha=group counts dead groups instead",
            file=sys.stderr,
        )

    def finish(self, left_because: str) -> None:
        """Write the report page of a run that came to its end, and say what there is to say.

        Args:
            left_because: why it leaves before; empty: it does not.
        """
        output = Path(self.config.trainer.output_dir)
        if not left_because or (output / METRICS).stat().st_size:  # before the first step: no row
            page = write_report(output)
            for line in (*summary_lines(read_metrics(output)), f"report: {page}"):
                self.message(line)
        if left_because:
            forget_request(self.config.trainer.output_dir)
            self.message(f"left in order: {left_because}; started again, the run goes on")
