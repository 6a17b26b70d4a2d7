"""Optimizer steps whose loss or gradient is not finite: how many in a row, and what was in them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpg_megatron.types import StepResult, TrainSample


class TooManyBadSteps(RuntimeError):
    """trainer.max_bad_steps optimizer steps in a row were skipped as not finite."""


class BadSteps:
    """Counts over the run. An update that is made ends a row; one without a gradient does not."""

    def __init__(self, limit: int) -> None:
        """limit: bad steps in a row that end the run, at least 1."""
        self._limit = limit
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
        return self._in_a_row >= self._limit

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
