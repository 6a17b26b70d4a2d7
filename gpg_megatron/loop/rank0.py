"""What rank 0 alone holds: the prompts, the engines, the scorers, the logs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from gpg_megatron.config.loading import config_yaml
from gpg_megatron.config.sections import Config
from gpg_megatron.data.stream import open_stream
from gpg_megatron.evaluation.evaluate import evaluate
from gpg_megatron.loop.inputs import Inputs
from gpg_megatron.loop.rollouts import Collector, sampling_requests
from gpg_megatron.observe.loggers import RunLogger
from gpg_megatron.observe.metrics import memory_metrics
from gpg_megatron.observe.progress import Progress
from gpg_megatron.observe.report import write_report
from gpg_megatron.observe.rundir import read_metrics
from gpg_megatron.observe.summary import summary_lines
from gpg_megatron.observe.watchdog import Watchdog
from gpg_megatron.reward.pool import RewardPool
from gpg_megatron.rollout.fleet import Fleet
from gpg_megatron.rollout.sampling import canary_params, validation_params
from gpg_megatron.types import Completion, Prompt, ScoredGroup, TrainSample

CANARY_PROMPTS = 8


class Conductor:
    """Rank 0's side of the loop. Close it, or leave its context, however the run ends."""

    def __init__(
        self, config: Config, inputs: Inputs, fleet: Fleet, watchdog: Watchdog, pids: Sequence[int]
    ) -> None:
        """The fleet stays the caller's to close.

        pids: of the other policy ranks on this host and the launcher, for memory/rss_gb."""
        self.fleet = fleet
        self._config = config
        self._pids = tuple(pids)
        self._val_prompts = inputs.val_prompts
        self._canary_prompts = inputs.train_prompts[:CANARY_PROMPTS]
        self._watchdog = watchdog
        stream = open_stream(
            inputs.train_prompts,
            per_file=inputs.per_file,
            weights=config.data.train_weights,
            seed=config.trainer.seed,
            shuffle=config.data.shuffle,
        )
        with ExitStack() as stack:
            longest = config.rollout.max_response_length
            self._pool = stack.enter_context(RewardPool(config.reward, max_response_length=longest))
            self._logger = stack.enter_context(
                RunLogger(config.trainer.output_dir, config.logging, config_yaml(config))
            )
            self._progress = stack.enter_context(Progress(config.trainer.total_training_steps))
            self._resources = stack.pop_all()
        self.rollouts = Collector(config, stream, fleet, self._pool, watchdog)

    def canary(self) -> list[tuple[Prompt, Completion]]:
        """A few short samples of the engines' weights, to compare with the policy's."""
        rollout = self._config.rollout
        requests = [
            replace(request, params=canary_params(rollout, seed=request.params.seed))
            for request in sampling_requests(self._config, self._canary_prompts, step=0, redraw=0)
        ]
        return list(zip(self._canary_prompts, self.fleet.generate(requests), strict=True))

    def evaluate(self, step: int) -> dict[str, float]:
        """Held-out accuracy; {} without validation files. The answers go to eval/step_N.jsonl."""
        if not self._val_prompts:
            return {}
        trainer, validation = self._config.trainer, self._config.validation
        params = validation_params(validation, self._config.rollout, seed=trainer.seed)
        path = Path(trainer.output_dir) / "eval" / f"step_{step}.jsonl"
        generations = path if validation.save_generations else None
        with self._watchdog.phase("eval"):
            return evaluate(self.fleet, self._pool, self._val_prompts, params, generations)

    def message(self, text: str) -> None:
        """One line for the person who watches."""
        self._progress.message(text)

    def report(
        self,
        step: int,
        metrics: Mapping[str, float],
        groups: Sequence[ScoredGroup] = (),
        samples: Sequence[TrainSample] = (),
    ) -> None:
        """Write one step everywhere; step 0 is the state before training."""
        metrics = {**metrics, **memory_metrics(self._pids)}
        self._logger.log(step, metrics)
        if step:
            self._progress.step(step, metrics)
            self._logger.write_rollouts(step, groups, samples)

    def finish(self) -> list[str]:
        """Write the report page of a run that came to its end; what there is to say of it."""
        page = write_report(self._config.trainer.output_dir)
        return [*summary_lines(read_metrics(page.parent)), f"report: {page}"]

    def close(self) -> None:
        """End the scorers and close the logs."""
        self._resources.close()
