"""A Hugging Face directory against a Megatron checkpoint, element by element."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from gpg_megatron.checkpoint.conversion import MEMORY_BYTES, N_THREADS, Progress, hf_places
from gpg_megatron.checkpoint.marker import check_same_model
from gpg_megatron.checkpoint.safetensors_files import RowReader
from gpg_megatron.checkpoint.to_hf import open_checkpoint, read_tensor, sources_of, stored_dtype
from gpg_megatron.checkpoint.torch_dist import ChunkReader
from gpg_megatron.checkpoint.workers import Budget, work_through
from gpg_megatron.layout.hf_io import check_checkpoint
from gpg_megatron.layout.topology import hf_shapes
from gpg_megatron.model.shape import load_model_shape


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A Hugging Face directory against a Megatron checkpoint."""

    n_tensors: int
    n_equal: int
    first_difference: str | None


def compare(hf: Path, megatron: Path, *, progress: Progress = lambda n: None) -> Comparison:
    """Every element of every tensor, after a cast to the type that the checkpoint has.

    Raises:
        UserError: either side is damaged, or they are not of the same architecture.
    """
    here = load_model_shape(hf)
    check_checkpoint(hf, here)
    places = hf_places(hf)
    checkpoint = open_checkpoint(megatron, check_files=True)
    check_same_model(megatron, checkpoint.marker, here)
    stored = checkpoint.stored
    sources = sources_of(here, stored, megatron)
    shapes = hf_shapes(here)
    different: list[str] = []
    budget = Budget(MEMORY_BYTES)

    def worker(number: int) -> Callable[[str], None]:
        chunks, rows = ChunkReader(megatron), RowReader()

        def check(name: str) -> None:
            n_bytes = math.prod(shapes[name]) * places[name].dtype.itemsize
            with budget.hold(number, 2 * n_bytes):
                wanted = torch.empty(shapes[name], dtype=places[name].dtype)
                rows.read(places[name], 0, wanted)
                kept = stored_dtype(sources[name], stored)
                found = torch.empty(shapes[name], dtype=kept)
                read_tensor(found, sources[name], stored, chunks)
                if not torch.equal(wanted.to(found.dtype), found):
                    different.append(name)
            progress(n_bytes)

        return check

    work_through(list(shapes), worker, N_THREADS)
    return Comparison(
        n_tensors=len(shapes),
        n_equal=len(shapes) - len(different),
        first_difference=min(different, default=None),
    )
