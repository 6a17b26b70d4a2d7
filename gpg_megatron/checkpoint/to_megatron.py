"""Hugging Face directory -> Megatron checkpoint, one parameter at a time.

safetensors rows --table of families.py--> parameter --shard boxes--> torch_dist chunks

The same table moves weights to the engines. No model is ever held whole: threads read and write
parameters under a memory budget.
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import BufferedWriter, FileIO
from pathlib import Path
from typing import Any

import torch
import xxhash

from gpg_megatron.checkpoint.conversion import (
    Converted,
    Progress,
    dtype_name,
    forget_quantisation,
    open_hf,
    output_directory,
    type_of,
)
from gpg_megatron.checkpoint.marker import HF_FILES, FileStamp, Marker, stamp, write_marker
from gpg_megatron.checkpoint.raw_io import flushed
from gpg_megatron.checkpoint.safetensors_files import TensorPlace, read_rows
from gpg_megatron.checkpoint.store import copy_hf_files, relative_files
from gpg_megatron.checkpoint.stored_layout import StoredParameter, shard_boxes, stored_parameters
from gpg_megatron.checkpoint.torch_dist import Chunk, Stored, append_chunk, write_index
from gpg_megatron.checkpoint.workers import MEMORY_BYTES, Budget, Scratch, work_through
from gpg_megatron.layout.boxes import Box, Piece
from gpg_megatron.layout.topology import Parameter, PolicyGrid, hf_shapes
from gpg_megatron.shapes import ModelShape


@dataclass(frozen=True, slots=True, kw_only=True)
class _Target:
    """One parameter and the rows of Hugging Face tensors that it is made of."""

    stored: StoredParameter
    dtype: torch.dtype
    sources: list[tuple[Piece, TensorPlace]]

    @property
    def n_bytes(self) -> int:
        return math.prod(self.stored.parameter.shape) * self.dtype.itemsize

    @property
    def order(self) -> tuple[bool, Path, int]:
        """The largest first, since they are handled alone; the others as they lie in files."""
        _, place = self.sources[0]
        return place.n_bytes < MEMORY_BYTES, place.path, place.offset

    def read(self, scratch: Scratch) -> torch.Tensor:
        """All of it; the padding of the vocabulary is zeros. Raises UserError."""
        tensor = scratch.tensor(self.stored.parameter.shape, self.dtype)
        if sum(piece.local.numel for piece, _ in self.sources) < tensor.numel():
            tensor.zero_()
        for piece, place in self.sources:
            read_rows(place, piece.hf.ranges[0][0], tensor[piece.local.slices])
        return tensor


def hf_to_megatron(
    hf: Path,
    megatron: Path,
    *,
    grid: PolicyGrid,
    dtype: torch.dtype | None = None,
    progress: Progress = lambda n, total: None,
) -> Converted:
    """Write a torch_dist checkpoint that any layout can load.

    Args:
        hf: directory with config.json and safetensors.
        megatron: new or empty directory.
        grid: how the files are split: as ranks of this grid would. Its tp_size decides how far
            the vocabulary is padded.
        dtype: of all tensors but state; None: each keeps its own.

    Raises:
        UserError: bad input, a value that dtype cannot hold, or no place to write to. Nothing is
            left of it.
    """
    shape, places = open_hf(hf)
    targets = sorted(_targets(shape, places, grid, dtype), key=lambda target: target.order)
    total = sum(target.n_bytes for target in targets)
    files: dict[str, _HashedFile] = {}
    chunks: defaultdict[str, list[Chunk]] = defaultdict(list)
    budget = Budget()

    def convert(target: _Target) -> None:
        with budget.hold(target.n_bytes) as scratch:
            tensor = target.read(scratch)
            for rank, box in _shards(target.stored.parameter, grid, shape):
                # No two threads write to the same file.
                name = f"__{rank}_{scratch.number}.distcp"
                if name not in files:
                    files[name] = _HashedFile(megatron / name)
                part = tensor[box.slices]
                whole = part.numel() == tensor.numel()
                data = tensor if whole else part.clone(memory_format=torch.contiguous_format)
                chunk = append_chunk(files[name], target.stored.box(box), data)
                chunks[target.stored.key].append(chunk)
        progress(target.n_bytes, total)

    with output_directory(megatron):
        with flushed(lambda: list(files.values())):
            work_through(convert, targets)
        index = {
            x.stored.key: Stored(x.stored.shape, x.dtype, tuple(chunks[x.stored.key]))
            for x in targets
        }
        write_index(megatron, index)
        copy_hf_files(hf, megatron / HF_FILES)
        forget_quantisation(megatron / HF_FILES / "config.json")
        stamps = {name: file.stamp for name, file in files.items()}
        for name in sorted(set(relative_files(megatron)) - stamps.keys()):
            stamps[name] = stamp(megatron / name)
        dtypes = {x.dtype for x in targets if not x.stored.parameter.rule.is_state}
        write_marker(megatron, _marker(shape, index, dtypes, grid, stamps))
    return Converted(n_bytes=total, n_tensors=len(hf_shapes(shape)))


def _targets(
    shape: ModelShape,
    places: Mapping[str, TensorPlace],
    grid: PolicyGrid,
    dtype: torch.dtype | None,
) -> Iterator[_Target]:
    for stored in stored_parameters(shape, grid.tp_size):
        sources = [(piece, places[piece.hf_name]) for piece in stored.pieces(shape)]
        becomes = type_of(stored.parameter.rule, sources[0][1].kept_as, dtype)
        yield _Target(stored=stored, dtype=becomes, sources=sources)


def _shards(parameter: Parameter, grid: PolicyGrid, shape: ModelShape) -> Iterator[tuple[int, Box]]:
    """(rank, what it stores of the parameter) for each rank that stores a part."""
    stage = grid.pp_size - 1 if parameter.rule.at_end else 0
    if parameter.numbers:
        stage = grid.stage_of_layer[parameter.numbers[0]]
    ep = None
    if parameter.expert is not None:
        ep = parameter.expert // (shape.num_experts // grid.ep_size)
    for tp in range(grid.tp_size):
        for box in shard_boxes(parameter, tp, grid.tp_size):
            yield grid.holders(stage, tp, ep)[0], box


class _HashedFile(BufferedWriter):
    """A file that is only appended to, and its digest."""

    def __init__(self, path: Path) -> None:
        super().__init__(FileIO(path, "w"))
        self._digest = xxhash.xxh3_128()
        self._n_bytes = 0

    def write(self, data: Any) -> int:
        self._digest.update(data)
        n_bytes = super().write(data)
        self._n_bytes += n_bytes
        return n_bytes

    @property
    def stamp(self) -> FileStamp:
        """What the file must be."""
        return FileStamp(n_bytes=self._n_bytes, xxh3=self._digest.hexdigest())


def _marker(
    shape: ModelShape,
    index: Mapping[str, Stored],
    dtypes: set[torch.dtype],
    grid: PolicyGrid,
    files: Mapping[str, FileStamp],
) -> Marker:
    return Marker(
        step=0,
        version=0,
        model=dataclasses.asdict(shape),
        padded_vocab_size=index["embedding.word_embeddings.weight"].shape[0],
        dtype=dtype_name(dtypes),
        has_optimizer=False,
        distributed_optimizer=False,
        layout={"tp": grid.tp_size, "pp": grid.pp_size, "dp": grid.dp_size, "ep": grid.ep_size},
        metric=None,
        files=files,
    )
