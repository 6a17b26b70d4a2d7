"""Megatron-Core's distributed checkpoint (torch_dist) as files: read and written in pieces.

    .metadata        pickle: tensor key -> size, type and chunks; chunk -> file, offset, length
    __R_I.distcp     one zip archive of torch.save after another, each holding one chunk
    common.pt, metadata.json

Nothing of an archive is unpickled: the bytes of a chunk are found by the zip's own directory.
"""

from __future__ import annotations

import json
import mmap
import pickle
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from gpg_megatron.checkpoint.raw_io import read_exactly
from gpg_megatron.errors import UserError
from gpg_megatron.layout.boxes import Box

METADATA = ".metadata"
_FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
# What the pickle may refer to: plain descriptions, and nothing that runs code when it is called.
_HARMLESS = {
    f"{module}.{name}"
    for module, names in (
        (
            "torch.distributed.checkpoint.metadata",
            "BytesStorageMetadata ChunkStorageMetadata Metadata MetadataIndex StorageMeta "
            "TensorProperties TensorStorageMetadata _MEM_FORMAT_ENCODING",
        ),
        (
            "torch.distributed.checkpoint.planner",
            "BytesIOWriteData SavePlan TensorWriteData WriteItem WriteItemType",
        ),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo _StoragePrefix"),
        ("torch.serialization", "_get_layout"),
        ("torch", "Size"),
        ("collections", "OrderedDict"),
        ("pathlib", "PosixPath"),
    )
    for name in names.split()
}


@dataclass(frozen=True, slots=True)
class Chunk:
    """A rectangle of a stored tensor and the torch.save archive that holds it."""

    box: Box
    file: str
    offset: int
    """Bytes before the archive."""
    length: int
    """Bytes of the archive."""


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor of a checkpoint."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[Chunk, ...]


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" in _HARMLESS:
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"it refers to {module}.{name}")


def read_index(directory: Path) -> dict[str, Stored]:
    """Every tensor of a checkpoint by its key.

    Raises:
        UserError: the metadata is missing, broken, or refers to more than descriptions of
            tensors.
    """
    path = directory / METADATA
    try:
        with path.open("rb") as file:
            metadata = _Unpickler(file).load()
        return {
            key: _stored(key, tensor, metadata.storage_data)
            for key, tensor in metadata.state_dict_metadata.items()
            if isinstance(tensor, TensorStorageMetadata)
        }
    except FileNotFoundError:
        raise UserError(f"{directory} is no Megatron checkpoint: it has no {METADATA}") from None
    # A damaged pickle raises whatever the damage leads to.
    except Exception as error:
        raise UserError(f"{path}: not the metadata of a checkpoint: {error}") from None


def _stored(key: str, tensor: TensorStorageMetadata, places: Mapping[Any, Any]) -> Stored:
    chunks = []
    for chunk in tensor.chunks:
        place = places[MetadataIndex(key, chunk.offsets)]
        ranges = tuple(
            (start, start + n) for start, n in zip(chunk.offsets, chunk.sizes, strict=True)
        )
        chunks.append(Chunk(Box(ranges), place.relative_path, place.offset, place.length))
    dtype = tensor.properties.dtype
    return Stored(tuple(tensor.size), dtype, tuple(chunks))


def read_box(directory: Path, stored: Stored, box: Box, out: torch.Tensor) -> None:
    """Fill out, shaped like box without its leading dimensions of extent 1, from all chunks.

    Raises:
        UserError: a file is missing or short, or the chunks do not cover the box.
    """
    target = out.view(box.shape)
    found = 0
    for chunk in stored.chunks:
        common = chunk.box.intersect(box)
        if common is not None:
            path = directory / chunk.file
            try:
                with path.open("rb") as file:
                    _read_part(file, chunk, common, target[common.relative_to(box).slices])
            except OSError as error:
                raise UserError(f"{path}: {error.strerror}") from None
            found += common.numel
    if found != box.numel:
        raise UserError(f"{directory}: only {found} of {box.numel} elements are stored")


def _read_part(file: BinaryIO, chunk: Chunk, box: Box, out: torch.Tensor) -> None:
    """The file is read from the first to the last element that is wanted."""
    size = out.dtype.itemsize
    part = torch.empty(chunk.box.shape, device="meta")[box.relative_to(chunk.box).slices]
    length = 1 + sum((n - 1) * stride for n, stride in zip(part.shape, part.stride(), strict=True))
    in_place = out.is_contiguous() and length == box.numel
    span = out if in_place else torch.empty(length, dtype=out.dtype)
    start = _data_offset(file, chunk, chunk.box.numel * size) + int(part.storage_offset()) * size
    read_exactly(file, span, start)
    if not in_place:
        out.copy_(span.as_strided(part.shape, part.stride()))


def _data_offset(file: BinaryIO, chunk: Chunk, n_bytes: int) -> int:
    """Where the elements of a chunk begin in its file: the only record of their size."""
    # zipfile finds an archive that other bytes precede; a map may only begin with a page.
    begin = chunk.offset - chunk.offset % mmap.ALLOCATIONGRANULARITY
    length = chunk.offset + chunk.length - begin
    try:
        with (
            mmap.mmap(file.fileno(), length, access=mmap.ACCESS_READ, offset=begin) as window,
            zipfile.ZipFile(cast(Any, window)) as archive,
        ):
            (record,) = [r for r in archive.infolist() if r.filename.endswith("/data/0")]
            head = window[record.header_offset : record.header_offset + 30]
    except (zipfile.BadZipFile, ValueError) as error:
        raise UserError(f"{file.name}: damaged at byte {chunk.offset}: {error}") from None
    stored_plainly = record.compress_type == zipfile.ZIP_STORED and record.file_size == n_bytes
    if not stored_plainly or head[:4] != b"PK\3\4":
        raise UserError(
            f"{file.name}: damaged at byte {chunk.offset}: expected {n_bytes} plain bytes"
        )
    name, extra = struct.unpack_from("<HH", head, 26)
    return begin + record.header_offset + len(head) + int(name) + int(extra)


def append_chunk(file: BinaryIO, box: Box, data: torch.Tensor) -> Chunk:
    """Write one chunk at the end of an open file of the checkpoint's directory.

    Args:
        file: opened for writing; its own position must be right.
        box: the part that data is, in the whole tensor's coordinates.
        data: contiguous, alone in its storage.

    Raises:
        OSError: the disk is full.
    """
    assert data.is_contiguous() and data.untyped_storage().nbytes() == data.nbytes
    offset = file.tell()
    try:
        torch.save(data.view(box.shape), file)
    except RuntimeError as error:
        # torch closes its archive after a failed write, and fails again.
        raise error.__context__ or error from None
    return Chunk(box, Path(file.name).name, offset, file.tell() - offset)


def write_index(directory: Path, index: Mapping[str, Stored]) -> None:
    """Everything besides the chunks, so that Megatron-Core finds them."""
    tensors: dict[str, Any] = {}
    places = {}
    for key, stored in index.items():
        chunks = []
        for chunk in stored.chunks:
            offsets = torch.Size(start for start, _ in chunk.box.ranges)
            chunks.append(ChunkStorageMetadata(offsets, torch.Size(chunk.box.shape)))
            places[MetadataIndex(key, offsets)] = _StorageInfo(
                chunk.file, chunk.offset, chunk.length
            )
        properties = TensorProperties(dtype=stored.dtype)
        tensors[key] = TensorStorageMetadata(properties, torch.Size(stored.shape), chunks)
    with (directory / METADATA).open("wb") as file:
        pickle.dump(Metadata(tensors, storage_data=places), file)
    torch.save({}, directory / "common.pt")
    (directory / "metadata.json").write_text(json.dumps(_FORMAT))
