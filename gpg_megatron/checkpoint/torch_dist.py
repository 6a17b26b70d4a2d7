"""Megatron-Core's distributed checkpoint (torch_dist) as files: read and written in pieces.

    .metadata        pickle: tensor key -> size, type and chunks; chunk -> file, offset, length
    __R_I.distcp     one zip archive of torch.save after another, each holding one chunk
    common.pt, metadata.json

Nothing of an archive is unpickled: the bytes of a chunk are found by the zip's own directory.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from collections.abc import Mapping, Sequence
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

from gpg_megatron.checkpoint.raw_io import as_bytes, read_exactly
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
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.planner": {
        "BytesIOWriteData",
        "SavePlan",
        "TensorWriteData",
        "WriteItem",
        "WriteItemType",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"},
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath"},
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


# ---- reading ------------------------------------------------------------------------------


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _HARMLESS.get(module, ()):
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


class ChunkReader:
    """Reads boxes of stored tensors. One for each thread; files stay open."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._files: dict[str, BinaryIO] = {}
        self._data_offsets: dict[tuple[str, int], int] = {}

    def read(self, stored: Stored, box: Box, out: torch.Tensor) -> None:
        """Fill out, shaped like box without its leading dimensions of extent 1, from all chunks.

        Raises:
            UserError: a file is missing or short, or the chunks do not cover the box.
        """
        target = out.view(box.shape)
        found = 0
        for chunk in stored.chunks:
            common = chunk.box.intersect(box)
            if common is not None:
                self._read_part(stored, chunk, common, target[common.relative_to(box).slices])
                found += common.numel
        if found != box.numel:
            raise UserError(f"{self._directory}: only {found} of {box.numel} elements are stored")

    def _read_part(self, stored: Stored, chunk: Chunk, box: Box, out: torch.Tensor) -> None:
        """The file is read from the first to the last element that is wanted."""
        local = box.relative_to(chunk.box)
        strides = _strides(chunk.box.shape)
        first = sum(
            start * stride for (start, _), stride in zip(local.ranges, strides, strict=True)
        )
        last = sum((stop - 1) * n for (_, stop), n in zip(local.ranges, strides, strict=True))
        span = out if out.is_contiguous() and last - first + 1 == box.numel else None
        if span is None:
            span = torch.empty(last - first + 1, dtype=stored.dtype)
        start = self._data_offset(stored, chunk) + first * stored.dtype.itemsize
        read_exactly(self._open(chunk.file), as_bytes(span), start)
        if span is not out:
            out.copy_(span.as_strided(box.shape, strides))

    def _data_offset(self, stored: Stored, chunk: Chunk) -> int:
        """Where the elements of a chunk begin in its file."""
        key = (chunk.file, chunk.offset)
        if key not in self._data_offsets:
            n_bytes = chunk.box.numel * stored.dtype.itemsize
            self._data_offsets[key] = chunk.offset + _record(self._open(chunk.file), chunk, n_bytes)
        return self._data_offsets[key]

    def _open(self, name: str) -> BinaryIO:
        if name not in self._files:
            path = self._directory / name
            try:
                self._files[name] = path.open("rb", buffering=0)
            except OSError as error:
                raise UserError(f"{path}: {error.strerror}") from None
        return self._files[name]

    def close(self) -> None:
        for file in self._files.values():
            file.close()


def _record(file: BinaryIO, chunk: Chunk, n_bytes: int) -> int:
    """Offset of the elements within a torch.save archive: the only record of their size."""
    # The directory is at the end; with fewer than 64 KiB all of an archive may be read.
    tail = min(chunk.length, 1 << 16)
    window = io.BytesIO(os.pread(file.fileno(), tail, chunk.offset + chunk.length - tail))
    shift = chunk.length - tail
    try:
        with zipfile.ZipFile(_Shifted(window, shift)) as archive:  # type: ignore[arg-type]
            records = [r for r in archive.infolist() if r.filename.endswith("/data/0")]
            (record,) = records
            header = os.pread(file.fileno(), 30, chunk.offset + record.header_offset)
    except (zipfile.BadZipFile, ValueError, OSError) as error:
        raise UserError(f"{file.name}: damaged at byte {chunk.offset}: {error}") from None
    stored_plainly = record.compress_type == zipfile.ZIP_STORED and record.file_size == n_bytes
    if not stored_plainly or header[:4] != b"PK\3\4":
        raise UserError(
            f"{file.name}: damaged at byte {chunk.offset}: expected {n_bytes} plain bytes"
        )
    name_and_extra = int.from_bytes(header[26:28], "little") + int.from_bytes(
        header[28:30], "little"
    )
    return record.header_offset + 30 + name_and_extra


class _Shifted(io.RawIOBase):
    """The last bytes of a longer file, in that file's coordinates."""

    def __init__(self, tail: io.BytesIO, shift: int) -> None:
        self._tail = tail
        self._shift = shift
        self._position = 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        end = self._shift + len(self._tail.getbuffer())
        self._position = offset + (0, self._position, end)[whence]
        if self._position < 0:
            raise ValueError("seek before the beginning")
        return self._position

    def tell(self) -> int:
        return self._position

    def read(self, size: int = -1) -> bytes:
        self._tail.seek(max(0, self._position - self._shift))
        data = self._tail.read(size)
        self._position += len(data)
        return data


def _strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Of a contiguous tensor, in elements."""
    strides = [1]
    for n in reversed(shape[1:]):
        strides.append(strides[-1] * n)
    return tuple(reversed(strides))


# ---- writing ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Written:
    """One chunk that is in its file now."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    chunk: Chunk


def append_chunk(
    file: BinaryIO, name: str, key: str, shape: tuple[int, ...], box: Box, data: torch.Tensor
) -> Written:
    """Write one chunk at the end of an open file.

    Args:
        file: opened for writing; its own position must be right.
        name: of the file, relative to the checkpoint.
        shape: of the whole tensor.
        box: the part that data is, in the tensor's coordinates.
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
    chunk = Chunk(box, name, offset, file.tell() - offset)
    return Written(key, shape, data.dtype, chunk)


def write_index(directory: Path, written: Sequence[Written]) -> None:
    """Everything besides the chunks, so that Megatron-Core finds them."""
    tensors: dict[str, TensorStorageMetadata] = {}
    places = {}
    for item in written:
        offsets = torch.Size(start for start, _ in item.chunk.box.ranges)
        if item.key not in tensors:
            properties = TensorProperties(dtype=item.dtype)
            tensors[item.key] = TensorStorageMetadata(properties, torch.Size(item.shape), [])
        tensors[item.key].chunks.append(
            ChunkStorageMetadata(offsets, torch.Size(item.chunk.box.shape))
        )
        places[MetadataIndex(item.key, offsets)] = _StorageInfo(
            item.chunk.file, item.chunk.offset, item.chunk.length
        )
    with (directory / METADATA).open("wb") as file:
        pickle.dump(Metadata(cast(Any, tensors), storage_data=places), file)
    torch.save({}, directory / "common.pt")
    (directory / "metadata.json").write_text(json.dumps(_FORMAT))
