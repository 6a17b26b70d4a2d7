"""What both directions of a conversion have in common."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from gpg_megatron.checkpoint.marker import sync_directory
from gpg_megatron.checkpoint.safetensors_files import TensorPlace, places_in
from gpg_megatron.errors import UserError
from gpg_megatron.layout.hf_io import check_checkpoint, index_of
from gpg_megatron.layout.rows import Rule
from gpg_megatron.model.fp8 import SUFFIX
from gpg_megatron.model.shape import fp8_blocks, load_model_shape
from gpg_megatron.shapes import ModelShape

Progress = Callable[[int, int], None]
"""Called with the bytes that are done since the last call, and all that there are to do."""


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


def forget_quantisation(config: Path) -> None:
    """Of a model that is in FP8 no more: an engine would look for scales."""
    raw = json.loads(config.read_text())
    if raw.pop("quantization_config", None) is not None:
        config.write_text(json.dumps(raw, indent=2) + "\n")


def type_of(rule: Rule, own: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    """Of a parameter after a conversion; wanted: of all tensors, None: each keeps its own."""
    if wanted is None:
        return own
    return torch.float32 if rule.is_state else wanted


def open_hf(hf: Path) -> tuple[ModelShape, dict[str, TensorPlace]]:
    """The model of a Hugging Face directory, and where each tensor lies, after all checks.

    Raises:
        UserError
    """
    shape = load_model_shape(hf, may_be_fp8=True)
    blocks = fp8_blocks(hf)
    check_checkpoint(hf, shape, blocks)
    files = sorted(set(index_of(hf).values()))
    places = {name: place for path in files for name, place in places_in(path).items()}
    return shape, {name: _scaled(place, places, blocks) for name, place in places.items()}


def _scaled(
    place: TensorPlace, places: Mapping[str, TensorPlace], blocks: tuple[int, int] | None
) -> TensorPlace:
    """With its scales, if it has some."""
    scales = places.get(place.name + SUFFIX)
    return replace(place, scales=scales, blocks=blocks) if blocks and scales else place


@contextmanager
def output_directory(path: Path) -> Iterator[None]:
    """A new directory to fill, empty again after a failure; trouble with the disk becomes one line.

    Raises:
        UserError: it has files already, cannot be made, or the disk is full.
    """
    try:
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise UserError(f"{path} exists and is not an empty directory; nothing was written")
        path.mkdir(parents=True, exist_ok=True)
        with _emptied_after_failure(path):
            yield
            sync_directory(path)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        free = shutil.disk_usage(next(p for p in (path, *path.absolute().parents) if p.exists()))
        raise UserError(
            f"cannot write {path}: {error.strerror or error}{where}; "
            f"{free.free / 1e9:.1f} GB are free there"
        ) from None


@contextmanager
def _emptied_after_failure(path: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        for child in path.iterdir():
            shutil.rmtree(child) if child.is_dir() else child.unlink()
        raise
