"""Safetensors files read and written row by row, so that no file is ever held in memory.

    8 bytes: length of the header | header: JSON, name -> {dtype, shape, data_offsets} | elements

The format is documented with the safetensors library, which maps or holds whole files instead.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from gpg_megatron.checkpoint.raw_io import as_bytes, read_exactly, write_exactly
from gpg_megatron.errors import UserError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """Where a tensor lies."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    """Bytes of the file before its first element."""

    @property
    def row_bytes(self) -> int:
        """Of one index of the first dimension."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def places_in(path: Path) -> dict[str, TensorPlace]:
    """Every tensor of one file.

    Raises:
        UserError: the header is damaged, the file is shorter than it says, or a tensor has a
            type that is not a floating-point one of 16 bits or more.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        size = path.stat().st_size
        if 8 + length > size:
            raise UserError(f"{path}: not a readable safetensors file")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            places = {}
            for name, entry in header.items():
                begin, end = entry["data_offsets"]
                place = TensorPlace(
                    path, DTYPES[entry["dtype"]], tuple(entry["shape"]), 8 + length + begin
                )
                if place.n_bytes != end - begin or 8 + length + end > size:
                    raise UserError(f"{path} is truncated or damaged: {name} is not all there")
                places[name] = place
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: not a readable safetensors file: {error}") from None
        except KeyError as error:
            raise UserError(f"{path}: {error} in its header is not supported") from None
    return places


class RowReader:
    """Reads runs of rows. One for each thread; files stay open."""

    def __init__(self) -> None:
        self._files: dict[Path, BinaryIO] = {}

    def read(self, place: TensorPlace, first_row: int, out: torch.Tensor) -> None:
        """Fill out, of the file's type and contiguous, with the rows from first_row on."""
        assert out.dtype == place.dtype
        if place.path not in self._files:
            self._files[place.path] = place.path.open("rb", buffering=0)
        start = place.offset + first_row * place.row_bytes
        read_exactly(self._files[place.path], as_bytes(out), start)

    def close(self) -> None:
        for file in self._files.values():
            file.close()


class ShardWriter:
    """The safetensors files and the index of one Hugging Face directory.

    Files are numbered and filled in the order of the tensors; tensors may be written in any
    order, from several threads.
    """

    def __init__(
        self,
        directory: Path,
        tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
        max_file_bytes: int,
    ) -> None:
        groups: list[list[str]] = [[]]
        size = 0
        for name, (dtype, shape) in tensors.items():
            n_bytes = math.prod(shape) * dtype.itemsize
            if groups[-1] and size + n_bytes > max_file_bytes:
                groups.append([])
                size = 0
            groups[-1].append(name)
            size += n_bytes
        self._places: dict[str, tuple[BinaryIO, int]] = {}
        self._files: list[BinaryIO] = []
        names = _file_names(len(groups))
        for file_name, group in zip(names, groups, strict=True):
            self._begin(directory / file_name, {name: tensors[name] for name in group})
        if len(groups) > 1:
            weight_map = {n: f for f, group in zip(names, groups, strict=True) for n in group}
            total = sum(math.prod(shape) * dtype.itemsize for dtype, shape in tensors.values())
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def _begin(
        self, path: Path, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
    ) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, (dtype, shape) in tensors.items():
            begin, end = end, end + math.prod(shape) * dtype.itemsize
            entry = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
            header[name] = entry
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        file = path.open("wb", buffering=0)
        self._files.append(file)
        file.write(len(text).to_bytes(8, "little") + text)
        base = 8 + len(text)
        file.truncate(base + end)
        begin = base
        for name, (dtype, shape) in tensors.items():
            self._places[name] = (file, begin)
            begin += math.prod(shape) * dtype.itemsize

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one whole tensor. Raises OSError."""
        file, offset = self._places[name]
        write_exactly(file, as_bytes(tensor), offset)

    @property
    def files(self) -> Sequence[BinaryIO]:
        return self._files

    def close(self) -> None:
        for file in self._files:
            file.close()


def _file_names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
