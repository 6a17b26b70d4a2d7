"""Saving and resuming a run: output_dir/checkpoints/step_N/, and exports in output_dir/hf/.

prepare (rank 0) -> every rank writes its shards -> stamps, marker, pruning, export (rank 0)
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

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
    list_saved,
    prune,
    relative_files,
    remove,
    step_directory,
)
from gpg_megatron.checkpoint.to_hf import megatron_to_hf
from gpg_megatron.config.loading import config_yaml
from gpg_megatron.config.sections import CheckpointConfig, Config, PolicyConfig
from gpg_megatron.errors import UserError, writing
from gpg_megatron.host.collectives import OnRank0
from gpg_megatron.loop.inputs import model_files
from gpg_megatron.loop.state import LoopState, write_state
from gpg_megatron.model.shape import padded_vocab_size
from gpg_megatron.policy.checkpoint import (
    CheckpointWriter,
    collect_stamps,
    make_folders,
    sync_to_disk,
)
from gpg_megatron.policy.policy import Policy
from gpg_megatron.shapes import ModelShape
from gpg_megatron.types import DTYPES


@dataclass(frozen=True, slots=True, kw_only=True)
class Saving:
    """What all checkpoints of a run have in common."""

    config: CheckpointConfig
    root: Path
    """Where they are."""
    export_root: Path
    """Where the Hugging Face directories are."""
    last_step: int
    model_files: Path
    """With config.json and the tokenizer."""
    config_yaml: str
    marker: Callable[..., Marker]
    """Takes step, version, metric and files."""

    def saves_at(self, step: int, leaves: bool) -> bool:
        """Whether a checkpoint is saved after a step, after which the run may leave."""
        every, last = self.config.save_freq, step == self.last_step
        if every and (leaves or step % every == 0):
            return True
        return last and (every > 0 or self.config.hf_export != "never")


def saving_of(config: Config, shape: ModelShape) -> Saving:
    """For a run of this configuration with a model of this shape."""
    p = config.policy
    return Saving(
        config=config.checkpoint,
        root=config.trainer.checkpoint_root,
        export_root=Path(config.trainer.output_dir) / "hf",
        last_step=config.trainer.total_training_steps,
        model_files=model_files(config),
        config_yaml=config_yaml(config),
        marker=partial(
            Marker,
            model=dataclasses.asdict(shape),
            padded_vocab_size=padded_vocab_size(shape, p.tensor_model_parallel_size),
            dtype=str(DTYPES[config.model.dtype]).removeprefix("torch."),
            has_optimizer=True,
            distributed_optimizer=p.use_distributed_optimizer,
            layout=layout_of(p),
        ),
    )


class RunCheckpoints:
    """The checkpoints of one run, as every rank sees them. Its methods are collective."""

    def __init__(self, saving: Saving, on_rank0: OnRank0, state: Callable[[], LoopState]) -> None:
        """state: called on rank 0."""
        self._saving = saving
        self._on_rank0 = on_rank0
        self._state = state
        self._writer = CheckpointWriter(asynchronous=saving.config.async_save)

    def saves_at(self, step: int, leaves: bool) -> bool:
        """Whether save_at will read the policy's parameters and optimizer."""
        return self._saving.saves_at(step, leaves)

    def save_at(
        self, step: int, policy: Policy, evals: Mapping[str, float], leaves: bool = False
    ) -> None:
        """Save if the step is one to save, and complete a save whose files are written; after
        the last step nothing is being written any more.

        Args:
            evals: of this step, on rank 0; they may hold checkpoint.best_metric.
            leaves: the run ends after this step.

        Raises:
            UserError: the disk is full, or the directory cannot be written.
        """
        self._writer.poll()
        if self.saves_at(step, leaves):
            self.wait()
            directory = self._on_rank0(lambda: self._prepare(step))
            metric = evals.get(self._saving.config.best_metric or "")
            version = policy.version
            policy.save(
                directory,
                self._writer,
                lambda: self._on_rank0(lambda: self._complete(directory, step, version, metric)),
            )
        if leaves or step == self._saving.last_step:
            self.wait()

    def wait(self) -> None:
        """Complete the save that is being written."""
        self._writer.wait()

    def newest(self) -> Path | None:
        """The newest complete checkpoint, when none is being written any more."""
        self.wait()
        saved = self._on_rank0(lambda: list_saved(self._saving.root))
        return next((one.path for one in reversed(saved) if one.complete), None)

    # ---- rank 0 ---------------------------------------------------------------------------

    def _prepare(self, step: int) -> Path:
        """An empty directory with everything but the ranks' own files."""
        directory = step_directory(self._saving.root, step).absolute()
        with writing(directory):
            if directory.exists():
                remove(directory)  # this very step again, after a resume from an earlier one
            make_folders(directory)
            copy_hf_files(self._saving.model_files, directory / HF_FILES)
            write_state(directory, self._state())
            (directory / "config.yaml").write_text(self._saving.config_yaml)
        return directory

    def _complete(self, directory: Path, step: int, version: int, metric: float | None) -> None:
        with writing(directory):
            stamps = collect_stamps(directory)
            for name in relative_files(directory):
                stamps.setdefault(name, stamp(directory / name))
            sync_to_disk(directory)
            marker = self._saving.marker(step=step, version=version, metric=metric, files=stamps)
            write_marker(directory, marker)
            keep = self._saving.config
            prune(directory.parent, keep.keep_last, keep.keep_best)
        last = step == self._saving.last_step
        if keep.hf_export == "every" or (keep.hf_export == "last" and last):
            self._export(directory)

    def _export(self, directory: Path) -> None:
        target = self._saving.export_root / directory.name
        part = target.with_name(target.name + ".part")
        for old in (part, target):
            if old.exists():
                shutil.rmtree(old)
        megatron_to_hf(directory, part, check_files=False)
        part.rename(target)


def layout_of(p: PolicyConfig) -> dict[str, int]:
    """For Marker.layout."""
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
