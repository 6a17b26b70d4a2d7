"""Safetensors files against the library of the format."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gpg_megatron.checkpoint.safetensors_files import INDEX, ShardWriter, places_in, read_rows
from gpg_megatron.errors import UserError
from gpg_megatron.layout.hf_io import index_of

TENSORS = {
    "a": torch.randn(4, 3),
    "b": torch.randn(5).bfloat16(),
    "c": torch.randn(2, 3, 4).half(),
    "d": torch.randn(6, 2),
}
PLAN = {name: (t.dtype, tuple(t.shape)) for name, t in TENSORS.items()}


@pytest.mark.parametrize(("limit", "n_files"), [(10**9, 1), (64, 3), (1, 4)])
def test_the_library_reads_what_is_written(tmp_path: Path, limit: int, n_files: int) -> None:
    writer = ShardWriter(tmp_path, PLAN, limit)
    for name in reversed(TENSORS):
        for row in (1, 0):
            rows = TENSORS[name][:1] if row == 0 else TENSORS[name][1:]
            writer.write(name, row, rows)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == n_files
    found = {name: (path.name, t) for path in files for name, t in load_file(path).items()}
    assert found.keys() == TENSORS.keys()
    for name, right in TENSORS.items():
        assert found[name][1].dtype == right.dtype and torch.equal(found[name][1], right)
    assert (tmp_path / INDEX).exists() == (n_files > 1)
    if n_files > 1:
        index = json.loads((tmp_path / INDEX).read_text())
        assert index["weight_map"] == {name: file for name, (file, _) in found.items()}
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in TENSORS.values())


def test_rows_of_what_the_library_wrote(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    places = places_in(tmp_path / "model.safetensors")
    assert {n: (p.dtype, p.shape) for n, p in places.items()} == PLAN
    for name, right in TENSORS.items():
        for first in range(len(right)):
            out = torch.empty_like(right[first:])
            read_rows(places[name], first, out)
            assert torch.equal(out, right[first:])


def test_rows_are_cast_on_the_way(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    out = torch.empty(2, 3, dtype=torch.bfloat16)
    read_rows(places_in(tmp_path / "model.safetensors")["a"], 1, out)
    assert torch.equal(out, TENSORS["a"][1:3].bfloat16())


def test_a_cast_that_loses_a_value_names_it(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"fits": torch.tensor([65504.0, -torch.inf]), "not": torch.tensor([1.0, -1e6])}, path)
    out = torch.empty(2, dtype=torch.float16)
    read_rows(places_in(path)["fits"], 0, out)
    assert out.tolist() == [65504.0, -torch.inf]
    with pytest.raises(UserError) as refused:
        read_rows(places_in(path)["not"], 0, out)
    assert str(refused.value) == (
        f"{path}: not has the value -1e+06, which float16 cannot hold (at most 65504); expected a "
        "--dtype with a wider range, or none"
    )
    read_rows(places_in(path)["not"], 0, wide := torch.empty(2, dtype=torch.bfloat16))
    assert wide[1].item() == pytest.approx(-1e6, rel=1e-2)


@pytest.mark.parametrize("cut", [1, 90])
def test_a_cut_file_is_refused(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path)
    os.truncate(path, path.stat().st_size - cut if cut == 1 else cut)
    with pytest.raises(UserError, match=r"model\.safetensors: not a readable safetensors file"):
        index_of(tmp_path)


def test_a_header_that_is_no_json_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes((4).to_bytes(8, "little") + b"{{{{" + bytes(10))
    with pytest.raises(UserError, match="not a readable safetensors file"):
        index_of(tmp_path)


def test_integer_tensors_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(2, dtype=torch.int8)}, path)
    with pytest.raises(UserError, match="'I8' in its header is not supported"):
        places_in(path)
