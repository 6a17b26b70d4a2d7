"""torch_dist files: what we write torch and Megatron read, and the other way round."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from gpg_megatron.checkpoint.torch_dist import (
    METADATA,
    Stored,
    append_chunk,
    read_box,
    read_index,
    write_index,
)
from gpg_megatron.errors import UserError
from gpg_megatron.layout.boxes import Box
from gpg_megatron.policy.checkpoint import load_sharded, staged

SHAPE = (3, 8, 6)
WHOLE = torch.arange(3 * 8 * 6, dtype=torch.float32).view(SHAPE)
CUTS = [(0, 5, 0, 6), (5, 8, 0, 4), (5, 8, 4, 6)]
"""Rows and columns of the chunks of each layer."""


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One tensor in nine chunks and two files."""
    directory = tmp_path_factory.mktemp("written")
    chunks = []
    with (directory / "__0_0.distcp").open("wb") as a, (directory / "__0_1.distcp").open("wb") as b:
        for layer in range(3):
            for r0, r1, c0, c1 in CUTS:
                file = a if r0 == 0 else b
                box = Box(((layer, layer + 1), (r0, r1), (c0, c1)))
                data = WHOLE[box.slices].clone()
                chunks.append(append_chunk(file, box, data))
    write_index(directory, {"weight": Stored(SHAPE, WHOLE.dtype, tuple(chunks))})
    return directory


def test_torch_reads_what_was_written(written: Path) -> None:
    state = {"weight": torch.zeros(SHAPE)}
    load(state, checkpoint_id=str(written), no_dist=True)
    assert torch.equal(state["weight"], WHOLE)


def test_what_torch_writes_is_read(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(5, 7), "b": torch.randn(3).bfloat16()}
    save(tensors, checkpoint_id=str(tmp_path), no_dist=True)
    index = read_index(tmp_path)
    for name, right in tensors.items():
        out = torch.empty_like(right)
        read_box(tmp_path, index[name], Box.whole(right.shape), out)
        assert index[name].dtype == right.dtype and torch.equal(out, right)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_box_is_read_from_the_chunks_that_it_crosses(
    written: Path, data: st.DataObject
) -> None:
    ranges = []
    for n in SHAPE:
        start = data.draw(st.integers(0, n - 1))
        ranges.append((start, data.draw(st.integers(start + 1, n))))
    box = Box(tuple(ranges))
    out = torch.empty(box.shape)
    read_box(written, read_index(written)["weight"], box, out)
    assert torch.equal(out, WHOLE[box.slices])


def test_a_box_outside_the_chunks_is_refused(written: Path, tmp_path: Path) -> None:
    stored = read_index(written)["weight"]
    part = Stored(stored.shape, stored.dtype, stored.chunks[:2])
    with pytest.raises(UserError, match="only 42 of 48 elements are stored"):
        read_box(written, part, Box(((0, 1), (0, 8), (0, 6))), torch.empty(1, 8, 6))


@dataclass(frozen=True)
class _Attack:
    """Unpickled it leaves a file behind."""

    path: str

    def __reduce__(self) -> tuple[object, tuple[str, ...]]:
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("read", [read_index, partial(load_sharded, {})], ids=["convert", "resume"])
def test_metadata_that_would_run_code_is_refused(
    written: Path, tmp_path: Path, read: Callable[[Path], object]
) -> None:
    for path in written.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    done = tmp_path / "done"
    (tmp_path / METADATA).write_bytes(pickle.dumps(_Attack(str(done))))
    with pytest.raises(UserError, match=r"not the metadata of a checkpoint: it refers to .*mkdir"):
        read(tmp_path)
    assert not done.exists()
    with pytest.raises(AttributeError):  # what it ran is no metadata
        FileSystemReader(tmp_path).read_metadata()
    assert done.exists(), "torch alone would have run it"


@pytest.mark.parametrize("keep", [0, 10, 300])
def test_cut_metadata_is_refused(written: Path, tmp_path: Path, keep: int) -> None:
    (tmp_path / METADATA).write_bytes((written / METADATA).read_bytes()[:keep])
    with pytest.raises(UserError, match="not the metadata of a checkpoint"):
        read_index(tmp_path)


def test_a_directory_without_metadata_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is no Megatron checkpoint: it has no \.metadata"):
        read_index(tmp_path)


def test_a_cut_file_is_named(written: Path, tmp_path: Path) -> None:
    for path in written.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    os.truncate(tmp_path / "__0_0.distcp", 500)
    stored = read_index(tmp_path)["weight"]
    with pytest.raises(UserError, match=r"__0_0\.distcp.* damaged"):
        read_box(tmp_path, stored, Box(((0, 1), (0, 5), (0, 6))), torch.empty(5, 6))
    (tmp_path / "__0_1.distcp").unlink()
    with pytest.raises(UserError, match=r"__0_1\.distcp: No such file"):
        read_box(tmp_path, stored, Box(((0, 1), (5, 8), (0, 6))), torch.empty(3, 6))


def test_copies_of_a_gpus_tensors_are_not_pinned() -> None:
    """Torch pins what it copies to the host without blocking."""

    class OnGpu:
        def to(self, device: str, *, non_blocking: bool) -> str:
            return f"{device}, pinned: {non_blocking}"

    bucket: Any = ("file", "key", ([], [("item", OnGpu())]))
    assert staged([bucket]) == [("file", "key", ([], [("item", "cpu, pinned: False")]))]
