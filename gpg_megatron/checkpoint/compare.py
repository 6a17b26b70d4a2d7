"""A Hugging Face directory against a Megatron checkpoint, element by element."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from gpg_megatron.checkpoint.conversion import Progress, open_hf
from gpg_megatron.checkpoint.marker import check_same_model
from gpg_megatron.checkpoint.safetensors_files import read_rows
from gpg_megatron.checkpoint.to_hf import Source, open_checkpoint
from gpg_megatron.checkpoint.workers import Budget, work_through
from gpg_megatron.layout.topology import hf_shapes


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A Hugging Face directory against a Megatron checkpoint."""

    n_tensors: int
    n_equal: int
    first_difference: str | None


def compare(hf: Path, megatron: Path, *, progress: Progress = lambda n, total: None) -> Comparison:
    """Every element of every tensor, after a cast to the type that the checkpoint has.

    Raises:
        UserError: either side is damaged, or they are not of the same architecture.
    """
    here, places = open_hf(hf)
    checkpoint = open_checkpoint(megatron, check_files=True)
    check_same_model(megatron, checkpoint.marker, here)
    total = sum(source.n_bytes for source in checkpoint.sources)
    different: set[str] = set()
    budget = Budget()

    def check(source: Source) -> None:
        with budget.hold(2 * source.n_bytes) as scratch:
            found = source.read(scratch)
            for piece in source.pieces:
                place = places[piece.hf_name]
                wanted = torch.empty(piece.hf.shape, dtype=place.dtype)
                read_rows(place, piece.hf.ranges[0][0], wanted)
                if not torch.equal(wanted.to(found.dtype), found[piece.local.slices]):
                    different.add(piece.hf_name)
        progress(source.n_bytes, total)

    work_through(check, checkpoint.sources)
    n_tensors = len(hf_shapes(here))
    return Comparison(
        n_tensors=n_tensors,
        n_equal=n_tensors - len(different),
        first_difference=min(different, default=None),
    )
