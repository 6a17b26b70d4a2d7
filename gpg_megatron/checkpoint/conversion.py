"""What both directions of a conversion have in common."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from gpg_megatron.checkpoint.marker import sync_directory
from gpg_megatron.checkpoint.safetensors_files import TensorPlace, places_in
from gpg_megatron.errors import UserError
from gpg_megatron.layout.boxes import Piece
from gpg_megatron.layout.hf_io import index_of
from gpg_megatron.model.shape import load_model_shape

N_THREADS = 2
MEMORY_BYTES = 384 << 20
"""In use by all threads together; a larger parameter is handled alone."""

Progress = Callable[[int], None]
"""Called with the bytes that are done since the last call."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Converted:
    """What a conversion wrote."""

    n_bytes: int
    """Of all tensors."""
    n_tensors: int
    """On the Hugging Face side."""


def dtype_name(dtypes: set[torch.dtype]) -> str:
    """For Marker.dtype."""
    return str(next(iter(dtypes))).removeprefix("torch.") if len(dtypes) == 1 else "mixed"


def check_whole_rows(piece: Piece) -> None:
    """What both directions rely on to read straight into place."""
    assert all(start == 0 for start, _ in (*piece.hf.ranges[1:], *piece.local.ranges[1:])), piece


def hf_places(hf: Path) -> dict[str, TensorPlace]:
    """Where every tensor of a Hugging Face directory lies. Raises UserError."""
    files = sorted(set(index_of(hf).values()))
    return {name: place for path in files for name, place in places_in(path).items()}


def hf_bytes(hf: Path) -> int:
    """Of all tensors of a Hugging Face directory. Raises UserError."""
    load_model_shape(hf)
    return sum(place.n_bytes for place in hf_places(hf).values())


@contextmanager
def output_directory(path: Path) -> Iterator[None]:
    """A new directory to fill; trouble with the disk becomes one line.

    Raises:
        UserError: it has files already, cannot be made, or the disk is full.
    """
    try:
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise UserError(f"{path} exists and is not an empty directory; nothing was written")
        path.mkdir(parents=True, exist_ok=True)
        yield
        sync_directory(path)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        free = shutil.disk_usage(next(p for p in (path, *path.absolute().parents) if p.exists()))
        raise UserError(
            f"cannot write {path}: {error.strerror or error}{where}; "
            f"{free.free / 1e9:.1f} GB are free there"
        ) from None
