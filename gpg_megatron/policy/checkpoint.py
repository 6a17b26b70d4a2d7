"""Weights, optimizer state and random states of the policy ranks as a Megatron checkpoint.

Any parallel layout can load it: Megatron describes each shard as a rectangle of a global tensor.
Files are written by forked processes, which see the memory as it was when they started, so
training may go on at once.
"""

from __future__ import annotations

import json
import os
import pickle
import queue
import shutil
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.api import CheckpointException

from gpg_megatron.checkpoint.marker import FileStamp, stamp
from gpg_megatron.checkpoint.torch_dist import read_index
from gpg_megatron.errors import UserError, writing
from gpg_megatron.policy.shards import (
    begin_states,
    optimizer_shards,
    parameter_regions,
    set_steps,
)

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
        models: Sequence[GPTModel],
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
        with writing(directory):
            _save_rng(directory)
            request = dist_checkpointing.save(
                _state(models, optimizer), str(directory), async_sharded_save=True
            )
        # The writer process reads its files once more: still in memory, and off the loop.
        buckets = request.async_fn_args[1] if request.async_fn else []
        written = [Path(path) for path, *_ in buckets]
        write = partial(_write_and_stamp, request.async_fn, written, directory)
        request = request._replace(
            async_fn=write if written else None, preload_fn=partial(staged, buckets)
        )
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


class _Results:
    """What the processes that write a save tell their rank, in a file without a name: a pipe would
    hold too little. Megatron would start a process on each rank to keep it, which imports torch.
    """

    def __init__(self) -> None:
        self._file = open(os.memfd_create("results"), "w+b", buffering=0)  # noqa: SIM115

    def put(self, results: Any) -> None:
        """In the process that writes."""
        self._file.write(pickle.dumps(results))

    def get_nowait(self) -> Any:
        """In the rank, when that process has ended. Raises queue.Empty."""
        self._file.seek(0)
        if data := self._file.read():
            return pickle.loads(data)
        raise queue.Empty


filesystem_async._get_write_results_queue = _Results


def staged(buckets: list[Any]) -> list[Any]:
    """What is to be written, in host memory of its own size.

    Megatron would copy from a GPU into pinned memory, which torch rounds up to a power of two for
    each tensor, and keeps.
    """
    writer = filesystem_async.FileSystemWriterAsync
    copied: list[Any] = writer.preload_tensors(buckets, non_blocking=False)
    return copied


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


def load_weights(models: Sequence[GPTModel], directory: Path) -> None:
    """Read this rank's shards of the parameters from a checkpoint of any layout. Collective."""
    load_sharded(_numbered(chain.from_iterable(parameter_regions(models).values())), directory)


def load_all(
    models: Sequence[GPTModel], optimizer: MegatronOptimizer, directory: Path, *, n_steps: int
) -> None:
    """Read parameters, master weights and moments from a checkpoint of any layout. Collective.

    Args:
        n_steps: how many steps the optimizer had done.
    """
    load_sharded(_state(models, optimizer), directory)
    set_steps(optimizer, n_steps)


def load_sharded(state: dict[str, ShardedTensor], directory: Path) -> None:
    """Read what the shards describe, into them. Collective.

    Raises:
        UserError: the checkpoint is damaged, has other tensors, or would run code when read.
    """
    # torch unpickles the metadata as it comes; this reader refuses whatever would run code.
    read_index(directory)
    try:
        dist_checkpointing.load(state, str(directory), strict=StrictHandling.RAISE_UNEXPECTED)
    except (CheckpointingException, CheckpointException, KeyError, pickle.UnpicklingError) as error:
        raise UserError(f"{directory} cannot be loaded: {_cause(error)}") from None


def _state(models: Sequence[GPTModel], optimizer: MegatronOptimizer) -> dict[str, ShardedTensor]:
    """All that a checkpoint holds of this rank."""
    begin_states(optimizer)
    regions = parameter_regions(models)
    shards = chain(chain.from_iterable(regions.values()), optimizer_shards(optimizer, regions))
    return _numbered(shards)


def _numbered(shards: Iterable[ShardedTensor]) -> dict[str, ShardedTensor]:
    """As Megatron wants them; it stores them under their own keys."""
    return {str(number): shard for number, shard in enumerate(shards)}


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
