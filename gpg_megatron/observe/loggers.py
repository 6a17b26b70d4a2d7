"""The run directory: config.yaml, metrics.jsonl, rollouts/; TensorBoard and wandb on request."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import yaml

from gpg_megatron.config.sections import LoggingConfig
from gpg_megatron.errors import UserError, writing
from gpg_megatron.observe.rundir import METRICS, damage
from gpg_megatron.types import Completion, Prompt, Reward, ScoredGroup, TrainSample

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

Value = float | int | None


def check_logging(config: LoggingConfig) -> None:
    """Raise UserError when a logger is configured whose package is not installed."""
    for name, wanted in (("tensorboard", config.tensorboard), ("wandb", config.wandb)):
        if wanted and importlib.util.find_spec(name) is None:
            raise UserError(
                f"logging.{name} is true but the package {name} is not installed; "
                f"install it (pip install {name}) or set logging.{name}=false"
            )


class RunLogger:
    """Writes what one run leaves behind; close() at the end.

    Opening a directory that has metrics already continues its metrics.jsonl.

    Args:
        output_dir: the run directory, made when absent.
        config: tensorboard, wandb, wandb_project, rollout_samples.
        config_yaml_text: the resolved configuration, written to config.yaml.

    Raises:
        UserError: a configured logger is not installed, or the directory cannot be made.
    """

    def __init__(
        self, output_dir: str | Path, config: LoggingConfig, config_yaml_text: str
    ) -> None:
        check_logging(config)
        self._config = config
        self._dir = Path(output_dir)
        try:
            self._dir.mkdir(parents=True, exist_ok=True)
            (self._dir / "config.yaml").write_text(config_yaml_text, encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"trainer.output_dir {self._dir}: {error.strerror}; expected a directory "
                "that can be made and written to"
            ) from None
        path = self._dir / METRICS
        _mend(path)
        self._metrics = path.open("a", encoding="utf-8")
        self._tensorboard: SummaryWriter | None = None
        self._wandb: Any = None
        if config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(self._dir / "tensorboard"))
        if config.wandb:
            import wandb

            self._wandb = wandb.init(
                project=config.wandb_project,
                name=self._dir.resolve().name,
                dir=str(self._dir),
                config=yaml.safe_load(config_yaml_text),
            )

    def log(self, step: int, metrics: Mapping[str, Value]) -> None:
        """Append one step to every log. Values that are not finite become null."""
        row = {key: _finite(value) for key, value in sorted(metrics.items())}
        with writing(self._dir / METRICS):
            self._metrics.write(json.dumps({"step": step, **row}, allow_nan=False) + "\n")
            self._metrics.flush()
        known = {key: value for key, value in row.items() if value is not None}
        if self._tensorboard is not None:
            for key, value in known.items():
                self._tensorboard.add_scalar(key, value, step)
            with writing(self._dir / "tensorboard"):
                self._tensorboard.flush()
        if self._wandb is not None:
            self._wandb.log(known, step=step)

    def write_rollouts(
        self, step: int, groups: Sequence[ScoredGroup], samples: Sequence[TrainSample]
    ) -> None:
        """Write the first logging.rollout_samples completions to rollouts/step_N.jsonl.

        `samples` are those of `groups`: sample.group indexes into it.
        """
        if not self._config.rollout_samples:
            return
        by_place = {(sample.group, sample.index): sample for sample in samples}
        rows = (
            _rollout_row(step, group.prompt, completion, reward, by_place[g, completion.index])
            for g, group in enumerate(groups)
            for completion, reward in zip(group.completions, group.rewards, strict=True)
        )
        path = self._dir / "rollouts" / f"step_{step}.jsonl"
        with writing(path):
            path.parent.mkdir(exist_ok=True)
            self._write_rows(path, rows)

    def _write_rows(self, path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
        with path.open("w", encoding="utf-8") as file:
            for row in islice(rows, self._config.rollout_samples):
                # ASCII escapes: a response may hold halves of surrogate pairs.
                file.write(json.dumps(row, allow_nan=False) + "\n")

    def close(self) -> None:
        """Flush and close every log."""
        self._metrics.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def _finite(value: Value) -> Value:
    if value is None or isinstance(value, int):
        return value
    number = float(value)
    return number if math.isfinite(number) else None


def _mend(path: Path) -> None:
    """Cut off what a run that was killed while writing left after the last line break, and name
    the lines that nothing can be read of."""
    if path.exists():
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
        if line := damage(path.parent):
            print(f"warning: {line}", file=sys.stderr)


def _rollout_row(
    step: int, prompt: Prompt, completion: Completion, reward: Reward, sample: TrainSample
) -> dict[str, Any]:
    logprobs = completion.logprobs.tolist()
    return {
        "step": step,
        "group": sample.group,
        "index": sample.index,
        "prompt_id": prompt.id,
        "prompt": _prompt_text(prompt),
        "response": completion.text,
        "ground_truth": prompt.ground_truth,
        "reward": _finite(reward.score),
        "accuracy": _finite(reward.accuracy),
        "parts": {part: _finite(value) for part, value in reward.parts.items()},
        "advantage": _finite(sample.advantage),
        "version": sample.version,
        "logprob_mean": _finite(fmean(logprobs)) if logprobs else None,
        "length": len(completion.token_ids),
        "finish_reason": completion.finish_reason,
    }


def _prompt_text(prompt: Prompt) -> str:
    if len(prompt.messages) == 1:
        return prompt.messages[0]["content"]
    return "\n\n".join(f"[{message['role']}]\n{message['content']}" for message in prompt.messages)
