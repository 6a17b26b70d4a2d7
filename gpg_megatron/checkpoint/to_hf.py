"""Megatron checkpoint -> Hugging Face directory, one parameter at a time.

torch_dist chunks --> parameter --table of families.py--> rows of safetensors files
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from gpg_megatron.checkpoint.conversion import (
    Converted,
    Progress,
    dtype_name,
    output_directory,
    type_of,
)
from gpg_megatron.checkpoint.marker import (
    HF_FILES,
    Marker,
    check_same_model,
    check_sizes,
    damaged_file,
    read_marker,
)
from gpg_megatron.checkpoint.raw_io import flushed
from gpg_megatron.checkpoint.safetensors_files import ShardWriter, cast
from gpg_megatron.checkpoint.store import copy_hf_files
from gpg_megatron.checkpoint.stored_layout import StoredParameter, stored_parameters
from gpg_megatron.checkpoint.torch_dist import Stored, read_box, read_index
from gpg_megatron.checkpoint.workers import MEMORY_BYTES, Budget, Scratch, work_through
from gpg_megatron.errors import UserError
from gpg_megatron.layout.boxes import Box, Piece
from gpg_megatron.layout.topology import hf_shapes
from gpg_megatron.model.shape import load_model_shape
from gpg_megatron.shapes import ModelShape

MAX_FILE_BYTES = 5 * 10**9
"""Of one safetensors file."""
OPTIMIZER_KEYS = "optimizer."


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One parameter of a checkpoint and what it holds of the Hugging Face tensors."""

    directory: Path
    stored: Stored
    parameter: StoredParameter
    pieces: list[Piece]

    @property
    def shape(self) -> tuple[int, ...]:
        """Without the padding of the vocabulary."""
        return (self.pieces[-1].local.ranges[0][1], *self.parameter.parameter.shape[1:])

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * self.stored.dtype.itemsize

    def type_as(self, wanted: torch.dtype | None) -> torch.dtype:
        """Of what is written; see type_of."""
        return type_of(self.parameter.parameter.rule, self.stored.dtype, wanted)

    def read(self, scratch: Scratch) -> torch.Tensor:
        """All of it, of the stored type. Raises UserError."""
        tensor = scratch.tensor(self.shape, self.stored.dtype)
        box = self.parameter.box(Box.whole(self.shape))
        read_box(self.directory, self.stored, box, tensor)
        return tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A whole Megatron checkpoint."""

    marker: Marker
    shape: ModelShape
    sources: list[Source]


def megatron_to_hf(
    megatron: Path,
    hf: Path,
    *,
    dtype: torch.dtype | None = None,
    progress: Progress = lambda n, total: None,
    check_files: bool = True,
) -> Converted:
    """Write a Hugging Face directory that transformers and vLLM load as it is.

    Args:
        megatron: a complete checkpoint, converted or from training.
        hf: new or empty directory.
        dtype: of all tensors but state; None: as they are stored.
        check_files: compare every file with its digest first.

    Raises:
        UserError: bad input, a value that dtype cannot hold, or no place to write to. Nothing is
            left of it.
    """
    checkpoint = open_checkpoint(megatron, check_files=check_files)
    sources = checkpoint.sources
    dtypes = {p.hf_name: s.type_as(dtype) for s in sources for p in s.pieces}
    plan = {name: (dtypes[name], shape) for name, shape in hf_shapes(checkpoint.shape).items()}
    budget = Budget()
    total = sum(source.n_bytes for source in sources)

    def convert(source: Source) -> None:
        with budget.hold(source.n_bytes) as scratch:
            tensor = source.read(scratch)
            for piece in source.pieces:
                rows = cast(tensor[piece.local.slices], dtypes[piece.hf_name], piece.hf_name)
                writer.write(piece.hf_name, piece.hf.ranges[0][0], rows)
        progress(source.n_bytes, total)

    with output_directory(hf):
        writer = ShardWriter(hf, plan, MAX_FILE_BYTES)
        with flushed(lambda: writer.files):
            work_through(convert, sources)
        copy_hf_files(megatron / HF_FILES, hf)
        trained = {s.type_as(dtype) for s in sources if not s.parameter.parameter.rule.is_state}
        _state_dtype(hf / "config.json", trained)
    n_bytes = sum(math.prod(shape) * kept.itemsize for kept, shape in plan.values())
    return Converted(n_bytes=n_bytes, n_tensors=len(plan))


def open_checkpoint(megatron: Path, *, check_files: bool) -> Checkpoint:
    """Find a checkpoint's model and parameters, after all checks; the largest come first.

    Raises:
        UserError
    """
    marker = read_marker(megatron)
    check_sizes(megatron, marker)
    if check_files:
        problems = work_through(lambda name: damaged_file(megatron, marker, [name]), marker.files)
        if found := min(filter(None, problems), default=None):
            raise UserError(found)
    shape = load_model_shape(megatron / HF_FILES, need_weights=False)
    check_same_model(megatron, marker, shape)
    sources = _sources(shape, megatron)
    # The largest are handled alone.
    sources.sort(key=lambda source: source.n_bytes * 2 < MEMORY_BYTES)
    return Checkpoint(marker=marker, shape=shape, sources=sources)


def _sources(shape: ModelShape, megatron: Path) -> list[Source]:
    """Raises UserError: a parameter is missing, unknown, or has another shape; it is named."""
    stored = read_index(megatron)
    sources = []
    for item in stored_parameters(shape, 1):
        found = stored[item.key].shape if item.key in stored else None
        vocabulary = "vocab" in item.parameter.rule.dims
        # The vocabulary may be padded for another tensor parallelism.
        fits = found is not None and (
            found == item.shape
            or (vocabulary and found[1:] == item.shape[1:] and found[0] >= shape.vocab_size)
        )
        if not fits:
            raise UserError(
                f"{megatron}: {item.key} has shape {found}; {shape.architecture} needs {item.shape}"
            )
        sources.append(
            Source(
                directory=megatron,
                stored=stored[item.key],
                parameter=item,
                pieces=item.pieces(shape),
            )
        )
    known = {source.parameter.key for source in sources}
    if extra := [k for k in stored if k not in known and not k.startswith(OPTIMIZER_KEYS)]:
        raise UserError(f"{megatron}: {extra[0]} is unknown to {shape.architecture}")
    return sources


def _state_dtype(config: Path, dtypes: set[torch.dtype]) -> None:
    """Write the type of the tensors into config.json, so that loaders do not cast them."""
    raw = json.loads(config.read_text())
    name = dtype_name(dtypes)
    key = "torch_dtype" if "torch_dtype" in raw else "dtype"
    if name != "mixed" and raw.get(key) != name:
        config.write_text(json.dumps({**raw, key: name}, indent=2) + "\n")
