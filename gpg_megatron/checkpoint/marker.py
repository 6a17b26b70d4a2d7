"""complete.json: written last, it says that a checkpoint is whole and what each file must be.

A directory without it is the remains of a save that was cut off.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from gpg_megatron.errors import UserError
from gpg_megatron.model.json_file import shown
from gpg_megatron.shapes import ModelShape

MARKER = "complete.json"
FORMAT = 1
HF_FILES = "hf"
"""Folder of a checkpoint with config.json and the tokenizer's files."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileStamp:
    """What a file must be."""

    n_bytes: int
    xxh3: str
    """Hexadecimal XXH3-128 of its bytes: against accidents, not against forgery."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Marker:
    """A whole checkpoint."""

    step: int
    """Rollout batches trained on; 0 for a converted model."""
    version: int
    """Optimizer steps done."""
    model: Mapping[str, Any]
    """ModelShape as a dictionary; vocab_size is the real one."""
    padded_vocab_size: int
    """Rows of the stored embedding."""
    dtype: str
    """Of the parameters, for example "bfloat16"; "mixed" for a model of several types."""
    has_optimizer: bool
    distributed_optimizer: bool
    """How the ranks kept the optimizer's state; any run can go on from it."""
    layout: Mapping[str, int]
    """tp, pp, cp, dp, ep of the ranks that wrote it, as far as they matter there."""
    metric: float | None
    """Of checkpoint.best_metric, when it had been measured."""
    files: Mapping[str, FileStamp]
    """Every other file, by its path within the checkpoint."""


def stamp(path: Path) -> FileStamp:
    """Read a file and say what it is. Raises OSError."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, xxhash.xxh3_128)
        return FileStamp(n_bytes=file.tell(), xxh3=digest.hexdigest())


def write_marker(directory: Path, marker: Marker) -> None:
    """Make a checkpoint complete, atomically. Raises OSError."""
    body = dataclasses.asdict(marker)
    text = json.dumps({"format": FORMAT, "digest": _digest(body), **body}, indent=1)
    part = directory / (MARKER + ".part")
    with part.open("w") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
    part.rename(directory / MARKER)
    sync_directory(directory)


def sync_directory(directory: Path) -> None:
    """Make the names in a directory survive a power cut."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_marker(directory: Path) -> Marker:
    """Raises UserError: not a checkpoint, an incomplete one, one of a newer format, or damaged."""
    path = directory / MARKER
    if not directory.is_dir():
        raise UserError(f"no such checkpoint: {directory}")
    try:
        body = json.loads(path.read_bytes())
        written_format, digest = body.pop("format"), body.pop("digest")
    except FileNotFoundError:
        raise UserError(
            f"{directory} has no {MARKER}: its save was cut off, or it is no checkpoint"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{path}: damaged") from None
    if written_format != FORMAT:
        raise UserError(
            f"{directory} has format {shown(written_format)}; this version reads format {FORMAT}"
        )
    if digest != _digest(body):
        raise UserError(f"{path}: damaged, its digest does not fit")
    body["files"] = {name: FileStamp(**entry) for name, entry in body["files"].items()}
    return Marker(**body)


def check_sizes(directory: Path, marker: Marker) -> None:
    """Every file is there and as long as it must be. Raises UserError."""
    for name, expected in marker.files.items():
        path = directory / name
        if not path.is_file():
            raise UserError(f"{directory} is damaged: {name} is missing")
        if path.stat().st_size != expected.n_bytes:
            raise UserError(
                f"{path} is truncated or damaged: it has {path.stat().st_size} bytes; "
                f"expected {expected.n_bytes}"
            )


def damaged_file(directory: Path, marker: Marker, names: Sequence[str]) -> str | None:
    """The first of some files whose bytes are not those that were saved, as one line."""
    for name in names:
        if stamp(directory / name) != marker.files[name]:
            return f"{directory / name} is damaged: its bytes are not those that were saved"
    return None


def check_same_model(directory: Path, marker: Marker, shape: ModelShape) -> None:
    """Raises UserError: the checkpoint is of another model; a difference is named."""
    here = json.loads(json.dumps(dataclasses.asdict(shape)))
    for key in here.keys() | marker.model.keys():
        one, other = marker.model.get(key), here.get(key)
        if _told(one) != _told(other):
            raise UserError(
                f"{directory} is a checkpoint of another model: {key} is {one}, "
                f"in model.path {other}"
            )


def _told(value: Any) -> Any:
    """Null for null, false, 0 or empty: fields that came later are that in models of before."""
    if isinstance(value, dict):
        return {key: _told(own) for key, own in value.items() if _told(own)}
    return value or None


def _digest(body: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(body, sort_keys=True).encode())
