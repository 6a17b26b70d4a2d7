"""Saving and resuming a run: output_dir/checkpoints/step_N/, and exports in output_dir/hf/.

prepare (rank 0) -> every rank writes its shards -> stamps, marker, pruning, export (rank 0)
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from gpg_megatron.checkpoint.marker import (
    HF_FILES,
    Marker,
    damaged_file,
    stamp,
    write_marker,
)
from gpg_megatron.checkpoint.store import (
    copy_hf_files,
    prune,
    relative_files,
    remove,
    step_directory,
)
from gpg_megatron.checkpoint.to_hf import megatron_to_hf
from gpg_megatron.config.loading import config_yaml
from gpg_megatron.config.sections import Config
from gpg_megatron.errors import UserError
from gpg_megatron.loop.inputs import model_files
from gpg_megatron.model.shape import padded_vocab_size
from gpg_megatron.policy.checkpoint import (
    CheckpointWriter,
    collect_stamps,
    make_folders,
    sync_to_disk,
)
from gpg_megatron.policy.policy import DTYPES, Policy
from gpg_megatron.types import ModelShape

TRAINER_STATE = "trainer.json"
OnRank0 = Callable[[Callable[[], Any]], Any]


class RunCheckpoints:
    """The checkpoints of one run, as every rank sees them. Its methods are collective."""

    def __init__(self, config: Config, shape: ModelShape, on_rank0: OnRank0) -> None:
        self._config = config
        self._shape = shape
        self._on_rank0 = on_rank0
        self._writer = CheckpointWriter(asynchronous=config.checkpoint.async_save)

    def save(
        self,
        step: int,
        policy: Policy,
        state: Callable[[], Mapping[str, Any]],
        metrics: Mapping[str, float],
    ) -> None:
        """Save if the step is one to save.

        Args:
            state: called on rank 0: what the loop itself has to remember, as plain JSON.
            metrics: of this step, on rank 0; they may hold checkpoint.best_metric.

        Raises:
            UserError: the disk is full, or the directory cannot be written.
        """
        if not self._config.saves_at(step):
            return
        self._writer.wait()
        directory = self._on_rank0(lambda: self._prepare(step, state()))
        metric = metrics.get(self._config.checkpoint.best_metric or "")
        version = policy.version
        policy.save(
            directory,
            self._writer,
            lambda: self._on_rank0(lambda: self._complete(directory, step, version, metric)),
        )

    def poll(self) -> None:
        """Complete a save whose files are written."""
        self._writer.poll()

    def wait(self) -> None:
        """Complete the save that is being written."""
        self._writer.wait()

    # ---- rank 0 ---------------------------------------------------------------------------

    def _prepare(self, step: int, state: Mapping[str, Any]) -> Path:
        """An empty directory with everything but the ranks' own files."""
        directory = step_directory(self._config.checkpoint_root, step).absolute()
        try:
            if directory.exists():
                remove(directory)  # this very step again, after a resume from an earlier one
            make_folders(directory)
            copy_hf_files(model_files(self._config), directory / HF_FILES)
            (directory / TRAINER_STATE).write_text(json.dumps(state))
            (directory / "config.yaml").write_text(config_yaml(self._config))
        except OSError as error:
            raise UserError(f"cannot write {directory}: {error.strerror}") from None
        return directory

    def _complete(self, directory: Path, step: int, version: int, metric: float | None) -> None:
        try:
            stamps = collect_stamps(directory)
            for name in relative_files(directory):
                stamps.setdefault(name, stamp(directory / name))
            sync_to_disk(directory)
            write_marker(directory, self._marker(step, version, metric, stamps))
            keep = self._config.checkpoint
            prune(directory.parent, keep.keep_last, keep.keep_best)
        except OSError as error:
            raise UserError(f"cannot write {directory}: {error.strerror}") from None
        last = step == self._config.trainer.total_training_steps
        if keep.hf_export == "every" or (keep.hf_export == "last" and last):
            self._export(directory)

    def _marker(
        self, step: int, version: int, metric: float | None, stamps: Mapping[str, Any]
    ) -> Marker:
        p = self._config.policy
        return Marker(
            step=step,
            version=version,
            model=dataclasses.asdict(self._shape),
            padded_vocab_size=padded_vocab_size(self._shape, p.tensor_model_parallel_size),
            dtype=str(DTYPES[self._config.model.dtype]).removeprefix("torch."),
            has_optimizer=True,
            distributed_optimizer=p.use_distributed_optimizer,
            layout=layout_of(self._config),
            metric=metric,
            files=stamps,
        )

    def _export(self, directory: Path) -> None:
        target = Path(self._config.trainer.output_dir) / "hf" / directory.name
        part = target.with_name(target.name + ".part")
        for old in (part, target):
            if old.exists():
                shutil.rmtree(old)
        megatron_to_hf(directory, part, check_files=False)
        part.rename(target)


def layout_of(config: Config) -> dict[str, int]:
    """For Marker.layout."""
    p = config.policy
    return {
        "tp": p.tensor_model_parallel_size,
        "pp": p.pipeline_model_parallel_size,
        "cp": p.context_parallel_size,
        "dp": p.data_parallel_size,
        "ep": p.expert_model_parallel_size,
    }


def check_bytes(directory: Path, marker: Marker) -> None:
    """Each rank reads its share of a checkpoint's files. Collective.

    Raises:
        UserError: on every rank, when a file is not what was saved.
    """
    share = sorted(marker.files)[dist.get_rank() :: dist.get_world_size()]
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, damaged_file(directory, marker, share))
    if found := sorted(filter(None, problems)):
        raise UserError(found[0])


def read_trainer_state(directory: Path) -> dict[str, Any]:
    """What RunCheckpoints.save was given."""
    return json.loads((directory / TRAINER_STATE).read_text())
