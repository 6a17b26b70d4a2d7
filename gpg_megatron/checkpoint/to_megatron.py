"""Hugging Face directory -> Megatron checkpoint, one parameter at a time.

safetensors rows --table of families.py--> parameter --shard boxes--> torch_dist chunks

The same table moves weights to the engines. No model is ever held whole: threads read and write
parameters under a memory budget.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
import xxhash

from gpg_megatron.checkpoint.conversion import (
    MEMORY_BYTES,
    N_THREADS,
    Converted,
    Progress,
    check_whole_rows,
    dtype_name,
    hf_places,
    output_directory,
)
from gpg_megatron.checkpoint.marker import HF_FILES, FileStamp, Marker, stamp, write_marker
from gpg_megatron.checkpoint.raw_io import Flusher
from gpg_megatron.checkpoint.safetensors_files import RowReader, TensorPlace
from gpg_megatron.checkpoint.store import copy_hf_files, relative_files
from gpg_megatron.checkpoint.stored_layout import StoredParameter, shard_boxes, stored_parameters
from gpg_megatron.checkpoint.torch_dist import Written, append_chunk, write_index
from gpg_megatron.checkpoint.workers import Budget, work_through
from gpg_megatron.layout.hf_io import check_checkpoint
from gpg_megatron.layout.topology import PolicyGrid, hf_shapes
from gpg_megatron.model.shape import load_model_shape
from gpg_megatron.types import ModelShape


def hf_to_megatron(
    hf: Path,
    megatron: Path,
    *,
    grid: PolicyGrid,
    dtype: torch.dtype | None = None,
    progress: Progress = lambda n: None,
) -> Converted:
    """Write a torch_dist checkpoint that any layout can load.

    Args:
        hf: directory with config.json and safetensors.
        megatron: new or empty directory.
        grid: how the files are split: as ranks of this grid would. Its tp_size decides how far
            the vocabulary is padded.
        dtype: of all tensors; None: each keeps its own.

    Raises:
        UserError: bad input, or no place to write to. What was written so far has no marker and
            no loader takes it.
    """
    shape = load_model_shape(hf)
    check_checkpoint(hf, shape)
    places = hf_places(hf)
    with output_directory(megatron):
        items = _in_file_order(list(stored_parameters(shape, grid.tp_size)), places, shape)
        with _ChunkFiles(megatron) as output, Flusher(output.files):
            budget = Budget(MEMORY_BYTES)

            def worker(number: int) -> Callable[[StoredParameter], None]:
                reader = RowReader()

                def convert(item: StoredParameter) -> None:
                    wanted = dtype or places[item.parameter.hf_names[0]].dtype
                    n_bytes = math.prod(item.parameter.shape) * wanted.itemsize
                    with budget.hold(number, n_bytes) as scratch:
                        tensor = scratch.tensor(item.parameter.shape, wanted)
                        _assemble(item, tensor, places, reader, shape)
                        _store(item, tensor, output, number, grid, shape)
                    progress(n_bytes)

                return convert

            work_through(items, worker, N_THREADS)
        stamps = output.stamps()
        write_index(megatron, output.written)
        copy_hf_files(hf, megatron / HF_FILES)
        for name in relative_files(megatron):
            if name not in stamps:
                stamps[name] = stamp(megatron / name)
        write_marker(megatron, _marker(shape, output.written, grid, stamps))
    n_bytes = sum(w.chunk.box.numel * w.dtype.itemsize for w in output.written)
    return Converted(n_bytes=n_bytes, n_tensors=len(hf_shapes(shape)))


def _in_file_order(
    items: list[StoredParameter], places: Mapping[str, TensorPlace], shape: ModelShape
) -> list[StoredParameter]:
    """The largest first, since they are handled alone; the others as they lie in their files."""

    def key(item: StoredParameter) -> tuple[bool, str, int]:
        place = places[item.parameter.hf_names[0]]
        return place.n_bytes < MEMORY_BYTES, str(place.path), place.offset

    return sorted(items, key=key)


def _assemble(
    item: StoredParameter,
    tensor: torch.Tensor,
    places: Mapping[str, TensorPlace],
    reader: RowReader,
    shape: ModelShape,
) -> None:
    """Fill a whole Megatron parameter from the rows of its Hugging Face tensors."""
    pieces = item.pieces(shape)
    if sum(piece.local.numel for piece in pieces) < tensor.numel():
        tensor.zero_()  # padding of the vocabulary
    for piece in pieces:
        check_whole_rows(piece)
        place, target = places[piece.hf_name], tensor[piece.local.slices]
        same = place.dtype == tensor.dtype
        rows = target if same else torch.empty(target.shape, dtype=place.dtype)
        reader.read(place, piece.hf.ranges[0][0], rows)
        if rows is not target:
            target.copy_(rows)


def _store(
    item: StoredParameter,
    tensor: torch.Tensor,
    output: _ChunkFiles,
    number: int,
    grid: PolicyGrid,
    shape: ModelShape,
) -> None:
    """Append the parameter's shards to the files of the ranks that hold them."""
    parameter = item.parameter
    stage = grid.pp_size - 1 if parameter.rule.at_end else 0
    if parameter.numbers:
        stage = grid.stage_of_layer[parameter.numbers[0]]
    ep = None
    if parameter.expert is not None:
        ep = parameter.expert // (shape.num_experts // grid.ep_size)
    for tp in range(grid.tp_size):
        rank = grid.holders(stage, tp, ep)[0]
        for box in shard_boxes(parameter, tp, grid.tp_size):
            part = tensor[box.slices]
            whole = part.numel() == tensor.numel()
            data = tensor if whole else part.clone(memory_format=torch.contiguous_format)
            output.append(f"__{rank}_{number}.distcp", item.key, item.shape, item.box(box), data)


class _ChunkFiles:
    """The .distcp files of one checkpoint; no two threads write to the same one."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._files: dict[str, _HashedFile] = {}
        self.written: list[Written] = []

    def append(self, name: str, *what: Any) -> None:
        if name not in self._files:
            self._files[name] = _HashedFile((self._directory / name).open("wb", buffering=0))
        self.written.append(append_chunk(self._files[name], name, *what))  # type: ignore[arg-type]

    def files(self) -> list[BinaryIO]:
        """Those that are open now."""
        return [file.file for file in list(self._files.values())]

    def stamps(self) -> dict[str, FileStamp]:
        """What the files must be."""
        return {name: file.stamp() for name, file in self._files.items()}

    def __enter__(self) -> _ChunkFiles:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()


class _HashedFile:
    """A file that is only appended to, and its digest."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self._digest = xxhash.xxh3_128()
        self._size = 0

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self._digest.update(view)
        done = 0
        while done < len(view):
            done += self.file.write(view[done:])
        self._size += done
        return done

    def tell(self) -> int:
        return self._size

    def flush(self) -> None:
        pass  # nothing is buffered

    def stamp(self) -> FileStamp:
        return FileStamp(n_bytes=self._size, xxh3=self._digest.hexdigest())

    def close(self) -> None:
        self.file.close()


def _marker(
    shape: ModelShape,
    written: Sequence[Written],
    grid: PolicyGrid,
    files: Mapping[str, FileStamp],
) -> Marker:
    dtypes = {w.dtype for w in written}
    rows = next(w.shape[0] for w in written if w.key == "embedding.word_embeddings.weight")
    return Marker(
        step=0,
        version=0,
        model=dataclasses.asdict(shape),
        padded_vocab_size=rows,
        dtype=dtype_name(dtypes),
        has_optimizer=False,
        distributed_optimizer=False,
        layout={"tp": grid.tp_size, "pp": grid.pp_size, "dp": grid.dp_size, "ep": grid.ep_size},
        metric=None,
        files=files,
    )
