"""A Hugging Face directory against a Megatron checkpoint, element by element."""

from __future__ import annotations

from pathlib import Path

import torch

from gpg_megatron.checkpoint.conversion import Progress, open_hf
from gpg_megatron.checkpoint.marker import check_same_model
from gpg_megatron.checkpoint.safetensors_files import read_rows
from gpg_megatron.checkpoint.to_hf import Source, open_checkpoint
from gpg_megatron.checkpoint.workers import Budget, work_through
from gpg_megatron.layout.topology import hf_shapes


def compare(
    hf: Path, megatron: Path, *, progress: Progress = lambda n, total: None
) -> dict[str, bool]:
    """Whether every element of each tensor is equal, after a cast to the checkpoint's type.

    Raises:
        UserError: either side is damaged, or they are not of the same architecture.
    """
    here, places = open_hf(hf)
    checkpoint = open_checkpoint(megatron, check_files=True)
    check_same_model(megatron, checkpoint.marker, here)
    total = sum(source.n_bytes for source in checkpoint.sources)
    equal = dict.fromkeys(hf_shapes(here), True)
    budget = Budget()

    def check(source: Source) -> None:
        with budget.hold(2 * source.n_bytes) as scratch:
            found = source.read(scratch)
            for piece in source.pieces:
                wanted = torch.empty(piece.hf.shape, dtype=found.dtype)
                read_rows(places[piece.hf_name], piece.hf.ranges[0][0], wanted)
                equal[piece.hf_name] &= is_same(wanted, found[piece.local.slices])
        progress(source.n_bytes, total)

    work_through(check, checkpoint.sources)
    return equal


def is_same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal everywhere, where NaN equals NaN."""
    return torch.equal(a, b) or torch.allclose(a, b, rtol=0.0, atol=0.0, equal_nan=True)
