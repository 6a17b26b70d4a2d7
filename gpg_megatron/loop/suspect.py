"""A batch with which a run has failed before is written down before it is learned from again."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path

from gpg_megatron.errors import writing
from gpg_megatron.types import NO_ROUTING, ScoredGroup

SUSPECT_VARIABLE = "GPG_SUSPECT_STEP"
"""Of a run that is started again: the step in which it failed."""


def suspect_step() -> int:
    """The same on every rank; 0: none."""
    return int(os.environ.get(SUSPECT_VARIABLE) or 0)


def suspect_file(output_dir: str | Path, step: int) -> Path:
    """Where its batch is."""
    return Path(output_dir) / f"suspect_step_{step}.jsonl"


def write_suspect(output_dir: str | Path, step: int, groups: Sequence[ScoredGroup]) -> None:
    """One group a line, with all its tokens. Raises UserError: the disk is full."""
    path = suspect_file(output_dir, step)
    with writing(path), path.open("w", encoding="utf-8") as file:
        for group in groups:
            row = dataclasses.asdict(_without_routing(group))
            file.write(json.dumps(row, default=lambda array: array.tolist()) + "\n")


def _without_routing(group: ScoredGroup) -> ScoredGroup:
    """It would be most of the file."""
    bare = (dataclasses.replace(c, routing=NO_ROUTING) for c in group.completions)
    return dataclasses.replace(group, completions=tuple(bare))
