"""Megatron checkpoint -> Hugging Face directory, one tensor at a time.

safetensors file <-- Hugging Face tensor <--table of families.py-- torch_dist chunks
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch

from gpg_megatron.checkpoint.conversion import (
    MEMORY_BYTES,
    N_THREADS,
    Converted,
    Progress,
    check_whole_rows,
    dtype_name,
    output_directory,
)
from gpg_megatron.checkpoint.marker import (
    HF_FILES,
    Marker,
    check_same_model,
    check_sizes,
    damaged_file,
    read_marker,
)
from gpg_megatron.checkpoint.raw_io import Flusher
from gpg_megatron.checkpoint.safetensors_files import ShardWriter
from gpg_megatron.checkpoint.store import copy_hf_files
from gpg_megatron.checkpoint.stored_layout import StoredParameter, stored_parameters
from gpg_megatron.checkpoint.torch_dist import ChunkReader, Stored, read_index
from gpg_megatron.checkpoint.workers import Budget, work_through
from gpg_megatron.errors import UserError
from gpg_megatron.layout.boxes import Piece
from gpg_megatron.layout.topology import hf_shapes
from gpg_megatron.model.shape import load_model_shape
from gpg_megatron.types import ModelShape

Source = tuple[StoredParameter, Piece]
MAX_FILE_BYTES = 5 * 10**9
"""Of one safetensors file."""
OPTIMIZER_KEYS = "optimizer."


def megatron_to_hf(
    megatron: Path,
    hf: Path,
    *,
    dtype: torch.dtype | None = None,
    progress: Progress = lambda n: None,
    check_files: bool = True,
) -> Converted:
    """Write a Hugging Face directory that transformers and vLLM load as it is.

    Args:
        megatron: a complete checkpoint, converted or from training.
        hf: new or empty directory.
        dtype: of all tensors; None: as they are stored.
        check_files: compare every file with its digest first.

    Raises:
        UserError: bad input, or no place to write to.
    """
    checkpoint = open_checkpoint(megatron, check_files=check_files)
    shape, stored = checkpoint.shape, checkpoint.stored
    sources = sources_of(shape, stored, megatron)
    shapes = hf_shapes(shape)
    plan = {name: (dtype or stored_dtype(sources[name], stored), s) for name, s in shapes.items()}
    with output_directory(hf):
        writer = ShardWriter(hf, plan, MAX_FILE_BYTES)
        with closing(writer), Flusher(lambda: writer.files):
            budget = Budget(MEMORY_BYTES)

            def worker(number: int) -> Callable[[str], None]:
                reader = ChunkReader(megatron)

                def convert(name: str) -> None:
                    kept = stored_dtype(sources[name], stored)
                    n_bytes = math.prod(shapes[name]) * kept.itemsize
                    with budget.hold(number, n_bytes) as scratch:
                        tensor = scratch.tensor(shapes[name], kept)
                        read_tensor(tensor, sources[name], stored, reader)
                        writer.write(name, tensor.to(plan[name][0]))
                    progress(n_bytes)

                return convert

            large_first = sorted(
                shapes, key=lambda name: math.prod(shapes[name]) * 2 < MEMORY_BYTES
            )
            work_through(large_first, worker, N_THREADS)
        copy_hf_files(megatron / HF_FILES, hf)
        _state_dtype(hf / "config.json", {d for d, _ in plan.values()})
    n_bytes = sum(math.prod(s) * d.itemsize for d, s in plan.values())
    return Converted(n_bytes=n_bytes, n_tensors=len(shapes))


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A whole Megatron checkpoint."""

    marker: Marker
    shape: ModelShape
    stored: dict[str, Stored]


def open_checkpoint(megatron: Path, *, check_files: bool) -> Checkpoint:
    """Find a checkpoint's model and tensors, after all checks.

    Raises:
        UserError
    """
    marker = read_marker(megatron)
    check_sizes(megatron, marker)
    if check_files:
        _check_bytes(megatron, marker)
    shape = load_model_shape(megatron / HF_FILES, need_weights=False)
    check_same_model(megatron, marker, shape)
    return Checkpoint(marker, shape, read_index(megatron))


def _check_bytes(megatron: Path, marker: Marker) -> None:
    problems: list[str] = []

    def worker(_: int) -> Callable[[str], None]:
        def check(name: str) -> None:
            if problem := damaged_file(megatron, marker, [name]):
                problems.append(problem)

        return check

    work_through(list(marker.files), worker, N_THREADS)
    if problems:
        raise UserError(min(problems))


def sources_of(
    shape: ModelShape, stored: Mapping[str, Stored], megatron: Path
) -> dict[str, list[Source]]:
    """Hugging Face name -> the pieces of stored parameters that together are the tensor.

    Raises:
        UserError: a parameter is missing, unknown, or has another shape; it is named.
    """
    sources: dict[str, list[Source]] = defaultdict(list)
    known = set()
    for item in stored_parameters(shape, 1):
        known.add(item.key)
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
        for piece in item.pieces(shape):
            sources[piece.hf_name].append((item, piece))
    if extra := [k for k in stored if k not in known and not k.startswith(OPTIMIZER_KEYS)]:
        raise UserError(f"{megatron}: {extra[0]} is unknown to {shape.architecture}")
    return dict(sources)


def read_tensor(
    tensor: torch.Tensor,
    sources: Sequence[Source],
    stored: Mapping[str, Stored],
    reader: ChunkReader,
) -> None:
    """Fill a Hugging Face tensor, of the stored type, from a checkpoint."""
    for item, piece in sources:
        check_whole_rows(piece)
        reader.read(stored[item.key], item.box(piece.local), tensor[piece.hf.slices])


def stored_dtype(sources: Sequence[Source], stored: Mapping[str, Stored]) -> torch.dtype:
    return stored[sources[0][0].key].dtype


def _state_dtype(config: Path, dtypes: set[torch.dtype]) -> None:
    """Write the type of the tensors into config.json, so that loaders do not cast them."""
    raw = json.loads(config.read_text())
    name = dtype_name(dtypes)
    key = "torch_dtype" if "torch_dtype" in raw else "dtype"
    if name != "mixed" and raw.get(key) != name:
        config.write_text(json.dumps({**raw, key: name}, indent=2) + "\n")


def model_bytes(megatron: Path, dtype: torch.dtype | None) -> int:
    """Of all tensors on the Hugging Face side of a checkpoint. Raises UserError."""
    checkpoint = open_checkpoint(megatron, check_files=False)
    sources = sources_of(checkpoint.shape, checkpoint.stored, megatron)
    return sum(
        math.prod(s) * (dtype or stored_dtype(sources[name], checkpoint.stored)).itemsize
        for name, s in hf_shapes(checkpoint.shape).items()
    )
