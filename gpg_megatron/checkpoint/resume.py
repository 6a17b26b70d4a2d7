"""Where a run goes on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gpg_megatron.checkpoint.marker import Marker, check_same_model, check_sizes, read_marker
from gpg_megatron.checkpoint.store import find_resume
from gpg_megatron.config.sections import Config
from gpg_megatron.errors import UserError
from gpg_megatron.shapes import ModelShape


@dataclass(frozen=True, slots=True, kw_only=True)
class ResumePoint:
    """The checkpoint that a run goes on from."""

    directory: Path
    marker: Marker


def find_resume_point(config: Config, shape: ModelShape) -> tuple[ResumePoint | None, list[str]]:
    """What checkpoint.resume means here, and warnings about checkpoints that are passed over.

    Raises:
        UserError: the checkpoint is incomplete, damaged, without optimizer state, or of another
            model.
    """
    directory, warnings = find_resume(config.trainer.checkpoint_root, config.checkpoint.resume)
    if directory is None:
        return None, warnings
    marker = check_marker(directory, shape)
    if not marker.has_optimizer:
        raise UserError(
            f"checkpoint.resume={directory} is a converted model without optimizer state; "
            f"start from it with model.path={directory}"
        )
    return ResumePoint(directory=directory.absolute(), marker=marker), warnings


def check_marker(directory: Path, shape: ModelShape) -> Marker:
    """A whole checkpoint of this model, with all its files. Raises UserError."""
    marker = read_marker(directory)
    check_sizes(directory, marker)
    check_same_model(directory, marker, shape)
    return marker
