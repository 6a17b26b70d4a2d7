"""Safetensors files read and written row by row, so that no file is ever held in memory.

    8 bytes: length of the header | header: JSON, name -> {dtype, shape, data_offsets} | elements

The format is documented with the safetensors library, which maps or holds whole files instead.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import BinaryIO

import torch

from gpg_megatron.checkpoint.raw_io import read_exactly, write_exactly
from gpg_megatron.errors import UserError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """Where a tensor lies."""

    path: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    """Bytes of the file before its first element."""
    scales: TensorPlace | None = None
    """One for each block; None: the elements are numbers as they are."""
    blocks: tuple[int, int] = (1, 1)
    """Rows and columns of a block."""

    @property
    def kept_as(self) -> torch.dtype:
        """The type of the numbers, unless another is wished for."""
        return torch.bfloat16 if self.scales else self.dtype

    @property
    def row_bytes(self) -> int:
        """Of one index of the first dimension."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def places_in(path: Path) -> dict[str, TensorPlace]:
    """Every tensor of one file, which check_checkpoint has read.

    Raises:
        UserError: a tensor has a type that is not a floating-point one of 16 bits or more.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    try:
        return {
            name: TensorPlace(
                path, name, DTYPES[x["dtype"]], tuple(x["shape"]), 8 + length + x["data_offsets"][0]
            )
            for name, x in header.items()
        }
    except KeyError as error:
        raise UserError(f"{path}: {error} in its header is not supported") from None


def read_rows(place: TensorPlace, first_row: int, out: torch.Tensor) -> None:
    """Fill out, contiguous, with the rows from first_row on; they are cast to its type.

    Raises:
        UserError: the file is cut, or the type cannot hold a value.
    """
    rows = out if out.dtype == place.dtype else torch.empty(out.shape, dtype=place.dtype)
    with place.path.open("rb") as file:
        read_exactly(file, rows, place.offset + first_row * place.row_bytes)
    if place.scales is not None:
        scales = torch.empty(place.scales.shape, dtype=place.scales.dtype)
        read_rows(place.scales, 0, scales)
        rows = dequantised(rows, scales, place.blocks, first_row)
    if rows is not out:
        out.copy_(cast(rows, out.dtype, f"{place.path}: {place.name}"))


def dequantised(
    stored: torch.Tensor, scales: torch.Tensor, blocks: tuple[int, int], first_row: int
) -> torch.Tensor:
    """fp32 rows of a matrix.

    Args:
        stored: FP8 [rows, columns], from first_row on.
        scales: of the whole matrix; see model/fp8.py.
    """
    of_row = torch.arange(first_row, first_row + len(stored)) // blocks[0]
    of_column = torch.arange(stored.shape[1]) // blocks[1]
    return stored.float() * scales.float()[of_row][:, of_column]


def cast(rows: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    """Rows in another type. Raises UserError: a finite value would become infinite."""
    narrow = rows.to(dtype)
    limit = torch.finfo(dtype).max
    if limit < torch.finfo(rows.dtype).max and narrow.isinf().any():
        lost = rows[narrow.isinf() & rows.isfinite()]
        if len(lost):
            raise UserError(
                f"{name} has the value {lost[0].item():g}, which {str(dtype)[6:]} cannot hold "
                f"(at most {limit:g}); expected a --dtype with a wider range, or none"
            )
    return narrow


class ShardWriter:
    """The safetensors files and the index of one Hugging Face directory.

    Files are numbered and filled in the order of the tensors; rows may be written in any order,
    from several threads.
    """

    def __init__(
        self,
        directory: Path,
        tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
        max_file_bytes: int,
    ) -> None:
        from huggingface_hub import split_torch_state_dict_into_shards

        self._places: dict[str, tuple[BinaryIO, TensorPlace]] = {}
        self.files: list[BinaryIO] = []
        shapes = {n: torch.empty(s, dtype=d, device="meta") for n, (d, s) in tensors.items()}
        split = split_torch_state_dict_into_shards(shapes, max_shard_size=max_file_bytes)
        for file_name, names in split.filename_to_tensors.items():
            self._begin(directory / file_name, {name: shapes[name] for name in names})
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def _begin(self, path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
        """Make a file of its whole length."""
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        ends = list(accumulate((tensor.nbytes for tensor in tensors.values()), initial=0))
        for (name, x), span in zip(tensors.items(), pairwise(ends), strict=True):
            header[name] = {"dtype": _NAMES[x.dtype], "shape": x.shape, "data_offsets": span}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        file = path.open("wb", buffering=0)
        self.files.append(file)
        file.write(len(text).to_bytes(8, "little") + text)
        begin = 8 + len(text)
        file.truncate(begin + ends[-1])
        for (name, x), start in zip(tensors.items(), ends, strict=False):
            self._places[name] = (
                file,
                TensorPlace(path, name, x.dtype, tuple(x.shape), begin + start),
            )

    def write(self, name: str, first_row: int, rows: torch.Tensor) -> None:
        """Write rows of a tensor, contiguous and of its type. Raises OSError."""
        file, place = self._places[name]
        write_exactly(file, rows, place.offset + first_row * place.row_bytes)
