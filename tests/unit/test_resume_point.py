"""What a run goes on from, and what it refuses to go on from."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from gpg_megatron.checkpoint.marker import Marker, stamp, write_marker
from gpg_megatron.checkpoint.resume import find_resume_point
from gpg_megatron.checkpoint.store import relative_files
from gpg_megatron.config.sections import (
    CheckpointConfig,
    Config,
    ModelConfig,
    TrainerConfig,
)
from gpg_megatron.errors import UserError
from gpg_megatron.shapes import ModelShape
from tests.unit.test_bridge_hf_io import TIED, UNTIED


def saved(root: Path, step: int = 5, **fields: Any) -> Path:
    """A checkpoint of TIED."""
    directory = root / "checkpoints" / f"step_{step}"
    directory.mkdir(parents=True)
    (directory / "data.distcp").write_bytes(b"data")
    marker = Marker(
        step=step,
        version=9,
        model=dataclasses.asdict(TIED),
        padded_vocab_size=384,
        dtype="float32",
        has_optimizer=True,
        distributed_optimizer=False,
        layout={"tp": 1, "pp": 1, "dp": 1, "ep": 1},
        metric=None,
        files={name: stamp(directory / name) for name in relative_files(directory)},
    )
    write_marker(directory, dataclasses.replace(marker, **fields))
    return directory


def config(root: Path, *, resume: str = "auto") -> Config:
    return Config(
        model=ModelConfig(path="unused"),
        trainer=TrainerConfig(output_dir=str(root)),
        checkpoint=CheckpointConfig(resume=resume),
    )


def test_the_newest_is_found_and_described(tmp_path: Path) -> None:
    assert find_resume_point(config(tmp_path), TIED) == (None, [])
    saved(tmp_path, 5)
    directory = saved(tmp_path, 10)
    point, warnings = find_resume_point(config(tmp_path), TIED)
    assert point is not None and point.directory == directory and warnings == []
    assert (point.marker.step, point.marker.version) == (10, 9)


@pytest.mark.parametrize(
    ("fields", "shape", "message"),
    [
        ({}, UNTIED, r"another model: tied is True, in model\.path False"),
        ({"has_optimizer": False}, TIED, r"a converted model .* start from it with model"),
    ],
)
def test_what_does_not_fit_is_refused(
    tmp_path: Path, fields: dict[str, Any], shape: ModelShape, message: str
) -> None:
    saved(tmp_path, **fields)
    with pytest.raises(UserError, match=message):
        find_resume_point(config(tmp_path), shape)


def test_a_truncated_checkpoint_is_refused_and_stays(tmp_path: Path) -> None:
    directory = saved(tmp_path)
    (directory / "data.distcp").write_bytes(b"dat")
    with pytest.raises(UserError, match=r"data\.distcp is truncated or damaged"):
        find_resume_point(config(tmp_path), TIED)
    assert relative_files(directory) == ["complete.json", "data.distcp"]


def test_a_path_that_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such checkpoint"):
        find_resume_point(config(tmp_path, resume=str(tmp_path / "nothing")), TIED)
