"""Weights, optimizer state and random states of the policy ranks as a Megatron checkpoint.

Any parallel layout can load it: Megatron describes each shard as a rectangle of a global tensor.
Files are written by forked processes, which see the memory as it was when they started, so
training may go on at once.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.api import CheckpointException

from gpg_megatron.checkpoint.marker import FileStamp, stamp
from gpg_megatron.checkpoint.torch_dist import read_index
from gpg_megatron.errors import UserError

RNG = "rng"
STAMPS = "stamps"


class CheckpointWriter:
    """Saves of one rank; at most one is being written. All methods are collective."""

    def __init__(self, *, asynchronous: bool) -> None:
        self._asynchronous = asynchronous
        self._queue = AsyncCallsQueue()
        self._finish: Callable[[], None] | None = None
        self._directory = Path()

    def save(
        self,
        model: GPTModel,
        optimizer: MegatronOptimizer,
        directory: Path,
        finish: Callable[[], None],
    ) -> None:
        """Begin to write; with asynchronous=False, also end.

        Args:
            directory: exists on every host that shares it, and is empty.
            finish: called on every rank once all shards are on disk.

        Raises:
            UserError: writing this or the previous checkpoint failed, for example for lack of
                room.
        """
        self.wait()
        try:
            _save_rng(directory)
            request = dist_checkpointing.save(
                _sharded_state(model, optimizer, loading=False),
                str(directory),
                async_sharded_save=True,
            )
        except OSError as error:
            raise UserError(f"cannot write {directory}: {error.strerror or error}") from None
        # The writer process reads its files once more: still in memory, and off the loop.
        written = [Path(path) for path, *_ in request.async_fn_args[1]] if request.async_fn else []
        write = partial(_write_and_stamp, request.async_fn, written, directory)
        request = request._replace(async_fn=write if written else None)
        self._finish, self._directory = finish, directory
        self._queue.schedule_async_request(request)
        if not self._asynchronous:
            self.wait()

    def poll(self) -> None:
        """Finish the save that is being written, if every rank is through."""
        self._finalize(blocking=False)

    def wait(self) -> None:
        """Finish the save that is being written."""
        self._finalize(blocking=True)

    def _finalize(self, *, blocking: bool) -> None:
        if self._finish is None:
            return
        try:
            done = self._queue.maybe_finalize_async_calls(blocking=blocking)
        except CheckpointException as error:
            free = shutil.disk_usage(self._directory).free / 1e9
            raise UserError(
                f"cannot write {self._directory}: {_cause(error)}; {free:.1f} GB are free there"
            ) from None
        if done:
            finish, self._finish = self._finish, None
            finish()


def _write_and_stamp(
    write: Callable[..., None], files: list[Path], directory: Path, *args: Any
) -> None:
    """In the forked process: write this rank's files, and note what they must be."""
    write(*args)
    if not all(path.exists() for path in files):
        return  # the failure is on its way to the rank
    stamps = {path.name: stamp(path) for path in files}
    text = json.dumps({n: {"n_bytes": s.n_bytes, "xxh3": s.xxh3} for n, s in stamps.items()})
    (directory / STAMPS / files[0].name).with_suffix(".json").write_text(text)


def collect_stamps(directory: Path) -> dict[str, FileStamp]:
    """What every rank noted; the notes are removed."""
    stamps: dict[str, FileStamp] = {}
    folder = directory / STAMPS
    for path in sorted(folder.iterdir()):
        stamps |= {name: FileStamp(**entry) for name, entry in json.loads(path.read_text()).items()}
        path.unlink()
    folder.rmdir()
    return stamps


def make_folders(directory: Path) -> None:
    """What ranks and their writers put files into."""
    (directory / RNG).mkdir(parents=True)
    (directory / STAMPS).mkdir()


def load_weights(model: GPTModel, directory: Path) -> None:
    """Read this rank's shards of the parameters from a checkpoint of any layout. Collective."""
    state = {"model": _model_state(model)}
    load_sharded(state, directory)


def load_all(model: GPTModel, optimizer: MegatronOptimizer, directory: Path) -> None:
    """Read parameters, master weights and moments from a checkpoint of any layout. Collective."""
    loaded = load_sharded(_sharded_state(model, optimizer, loading=True), directory)
    parts = _parts(optimizer)
    states = [loaded["optimizer"]] if len(parts) == 1 else _in_order(loaded["optimizer"])
    for part, state in zip(parts, states, strict=True):
        if _has_own_steps(part):
            _load_moments_and_steps(part, state)
        else:
            part.load_state_dict(state)


def load_sharded(state: dict[str, Any], directory: Path) -> dict[str, Any]:
    """Read what a sharded state describes. Megatron writes the parameters in place: the shards
    alias them. Collective.

    Raises:
        UserError: the checkpoint is damaged, has other tensors, or would run code when read.
    """
    # torch unpickles the metadata as it comes; this reader refuses whatever would run code.
    read_index(directory)
    try:
        loaded: dict[str, Any] = dist_checkpointing.load(
            state, str(directory), strict=StrictHandling.RAISE_UNEXPECTED
        )
    except (CheckpointingException, CheckpointException, KeyError, pickle.UnpicklingError) as error:
        raise UserError(f"{directory} cannot be loaded: {_cause(error)}") from None
    return loaded


def _sharded_state(
    model: GPTModel, optimizer: MegatronOptimizer, *, loading: bool
) -> dict[str, Any]:
    _begin_states(optimizer)
    model_state = _model_state(model)
    optimizer_state = optimizer.sharded_state_dict(
        model_state, is_loading=loading, metadata=_sharding()
    )
    # Objects would be pickled, and unpickled without a check.
    assert not any(isinstance(v, ShardedObject) for v in nested_values(optimizer_state))
    return {"model": model_state, "optimizer": optimizer_state}


def _begin_states(optimizer: MegatronOptimizer) -> None:
    """Megatron asks torch's Adam in a distributed optimizer for its step count, which it has only
    after the first step; loading comes before, and saving may."""
    for part in filter(_has_own_steps, _parts(optimizer)):
        part.init_state_fn(part.optimizer, part.config)
        for state in part.optimizer.state.values():
            state.setdefault("step", torch.tensor(0.0))


def _load_moments_and_steps(part: DistributedOptimizer, state: dict[str, Any]) -> None:
    """Megatron looks for the step count of torch's Adam among the loaded moments, where it did
    not save it; it comes with the parameter groups."""
    moments = state.pop("param_state")
    part.load_state_dict(state)
    # Besides, it gives all parameters one and the same count, to which each would add its steps.
    steps = {p: kept.pop("step").clone() for p, kept in part.optimizer.state.items()}
    part.load_parameter_state_from_fully_reshardable(moments)
    for parameter, step in steps.items():
        part.optimizer.state[parameter]["step"] = step


def _has_own_steps(part: MegatronOptimizer) -> bool:
    """Whether it is a distributed optimizer around torch's Adam, not one of Apex or TE."""
    return isinstance(part, DistributedOptimizer) and isinstance(part.optimizer, torch.optim.Adam)


def _parts(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """Megatron keeps parameters of experts in an optimizer of their own."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def _in_order(states: Mapping[int, dict[str, Any]]) -> list[dict[str, Any]]:
    return [states[number] for number in sorted(states)]


def _model_state(model: GPTModel) -> dict[str, Any]:
    """Parameters only: the extra state of linear layers is about formats of 8 bits."""
    state = model.sharded_state_dict(metadata=_sharding())
    return {name: v for name, v in state.items() if not name.endswith("_extra_state")}


def _sharding() -> dict[str, Any]:
    return {
        # The only form that another layout can load with the distributed optimizer.
        "distrib_optim_sharding_type": "fully_reshardable",
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


# ---- random states --------------------------------------------------------------------------


def _save_rng(directory: Path) -> None:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():  # this rank is on a GPU
        states["cuda"] = torch.cuda.get_rng_state()
    states |= {f"tracker.{k}": v.cpu() for k, v in get_cuda_rng_tracker().get_states().items()}
    save_file({k: v.clone() for k, v in states.items()}, _rng_file(directory))


def load_rng(directory: Path) -> None:
    """Continue the random states of the rank that had this number."""
    states = load_file(_rng_file(directory))
    torch.set_rng_state(states.pop("cpu"))
    if "cuda" in states and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(states["cuda"])
    prefix = "tracker."
    get_cuda_rng_tracker().set_states(
        {k.removeprefix(prefix): v for k, v in states.items() if k.startswith(prefix)}
    )


def _rng_file(directory: Path) -> Path:
    return directory / RNG / f"rank_{dist.get_rank()}.safetensors"


def _cause(error: BaseException) -> str:
    """The innermost reason of one of Megatron's or torch's exceptions, as one line."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    text = str(error).strip() or repr(error)
    return text.splitlines()[0]


def sync_to_disk(directory: Path) -> None:
    """Flush what was written without it: the small files."""
    for path in directory.rglob("*"):
        if path.is_file() and path.suffix != ".distcp":
            with path.open("rb") as file:
                os.fsync(file.fileno())
