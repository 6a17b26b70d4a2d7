"""Files of a user's with anything in them: what reads them succeeds, or says one line."""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpg_megatron.checkpoint.marker import (
    MARKER,
    Marker,
    check_sizes,
    damaged_file,
    read_marker,
    stamp,
    write_marker,
)
from gpg_megatron.checkpoint.store import find_resume, list_saved, prune
from gpg_megatron.errors import UserError
from gpg_megatron.model.hub import SHAPES
from gpg_megatron.model.shape import load_model_shape, shape_warnings
from gpg_megatron.observe.rundir import damage, read_metrics
from gpg_megatron.observe.summary import summary_lines

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["full_attention", "default", "yarn", "\ud800", "float8", "silu", "qwen2"])
)
VALUES = st.recursive(
    SCALARS,
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=8), x, max_size=3),
    max_leaves=6,
)
MODELS = [json.loads(path.read_text()) for path in sorted(SHAPES.rglob("config.json"))]
KEYS = sorted({key for model in MODELS for key in model} | {"rope_scaling", "quantization_config"})


@contextmanager
def one_line() -> Iterator[None]:
    """Success, or a UserError of one printable line."""
    try:
        yield
    except UserError as error:
        text = str(error)
        assert text and "\n" not in text
        text.encode()


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def read_config(folder: Path, content: bytes) -> None:
    (folder / "config.json").write_bytes(content)
    with one_line():
        shape = load_model_shape(folder, need_weights=False)
        assert shape.num_layers > 0 and shape.hidden_size > 0 and shape.vocab_size > 0
        for line in shape_warnings(folder):
            assert "\n" not in line


@settings(max_examples=150)
@given(st.data())
def test_a_config_json_with_other_values(folder: Path, data: st.DataObject) -> None:
    changes = data.draw(st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=6), VALUES))
    removed = data.draw(st.sets(st.sampled_from(KEYS), max_size=2))
    model = data.draw(st.sampled_from(MODELS)) | changes
    text = json.dumps({key: value for key, value in model.items() if key not in removed})
    read_config(folder, text.encode("utf-8", "surrogatepass"))


def flipped(content: bytes) -> st.SearchStrategy[bytes]:
    """The bytes cut, or with some of them changed, removed or put in."""
    place = st.integers(0, len(content))

    def apply(edits: list[tuple[int, int, bytes]]) -> bytes:
        found = content
        for start, n_gone, added in edits:
            found = found[:start] + added + found[start + n_gone :]
        return found

    edit = st.tuples(place, st.integers(0, 3) | place, st.binary(max_size=3))
    return st.lists(edit, min_size=1, max_size=3).map(apply)


@settings(max_examples=200)
@given(flipped(json.dumps(MODELS[0]).encode()))
def test_the_bytes_of_a_config_json(folder: Path, content: bytes) -> None:
    read_config(folder, content)


METRICS = b"".join(
    json.dumps({"step": i, "reward/mean": i / 7, "eval/a/mean@1": None, "timing/rollout_s": 1e-3})
    .encode() + b"\n"
    for i in range(4)
)  # fmt: skip


def read_run(folder: Path, content: bytes) -> None:
    (folder / "metrics.jsonl").write_bytes(content)
    with one_line():
        damage(folder)
        rows = read_metrics(folder)
        steps = [row["step"] for row in rows]
        assert steps == sorted(set(steps))
        assert all("\n" not in line for line in summary_lines(rows))


@settings(max_examples=200)
@given(flipped(METRICS))
def test_the_bytes_of_metrics(folder: Path, content: bytes) -> None:
    read_run(folder, content)


@settings(max_examples=200)
@given(st.lists(VALUES | st.fixed_dictionaries({"step": SCALARS, "memory/rss_gb": VALUES})))
def test_metrics_with_other_rows(folder: Path, rows: list[Any]) -> None:
    read_run(folder, "".join(f"{json.dumps(row)}\n" for row in rows).encode())


# ---- checkpoints ----------------------------------------------------------------------------

FILES = {"__0_0.distcp": b"weights" * 9, "common.pt": b"x", "hf/config.json": b"{}"}


@pytest.fixture(scope="module")
def checkpoint(folder: Path) -> Path:
    path = folder / "good"
    for name, content in FILES.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    marker = Marker(
        step=2,
        version=4,
        model=dataclasses.asdict(
            load_model_shape(SHAPES / "runs/demo_model/model", need_weights=False)
        ),
        padded_vocab_size=384,
        dtype="bfloat16",
        has_optimizer=True,
        distributed_optimizer=False,
        layout={"tp": 1, "pp": 1, "cp": 1, "dp": 1, "ep": 1},
        metric=0.5,
        files={name: stamp(path / name) for name in FILES},
    )
    write_marker(path, marker)
    return path


def is_whole(directory: Path) -> bool:
    """As a run that goes on looks at a checkpoint; False: one line said why not."""
    with one_line():
        marker = read_marker(directory)
        check_sizes(directory, marker)
        return damaged_file(directory, marker, sorted(marker.files)) is None
    return False


def cut(path: Path, content: bytes, _: bytes) -> None:
    path.write_bytes(content[: len(content) // 2])


def remove(path: Path, *_: bytes) -> None:
    path.unlink()


def replace(path: Path, content: bytes, other: bytes) -> None:
    path.write_bytes(other if other != content else b"")


def make_folder(path: Path, *_: bytes) -> None:
    path.unlink()
    path.mkdir()


@settings(max_examples=200)
@given(
    st.sampled_from([*FILES, MARKER]),
    st.sampled_from([cut, remove, replace, make_folder]),
    st.binary(max_size=80),
)
def test_a_checkpoint_with_a_file_that_is_not_what_was_saved(
    folder: Path, checkpoint: Path, name: str, damage_it: Callable[..., None], other: bytes
) -> None:
    copy = Path(tempfile.mkdtemp(dir=folder)) / "step_2"
    shutil.copytree(checkpoint, copy)
    (copy / "extra.txt").write_bytes(other)
    assert is_whole(copy), "a file more is no damage"
    damage_it(copy / name, (copy / name).read_bytes(), other)
    assert not is_whole(copy)
    shutil.rmtree(copy.parent)


@settings(max_examples=300)
@given(st.data())
def test_the_bytes_of_a_marker(folder: Path, checkpoint: Path, data: st.DataObject) -> None:
    good = (checkpoint / MARKER).read_bytes()
    content = data.draw(flipped(good) | VALUES.map(lambda x: json.dumps(x).encode()))
    copy = folder / "marked" / "step_2"
    if not copy.exists():
        shutil.copytree(checkpoint, copy)
    (copy / MARKER).write_bytes(content)
    is_whole(copy)
    with one_line():
        find_resume(copy.parent, "auto")


@settings(max_examples=100)
@given(st.lists(st.sampled_from(["step_1", "step_02", "step_x", "step_-1", "step_3/", "other"])))
def test_what_else_lies_among_checkpoints(checkpoint: Path, names: list[str]) -> None:
    with tempfile.TemporaryDirectory() as root:
        shutil.copytree(checkpoint, Path(root) / "step_2")
        for name in names:
            if name.endswith("/"):
                (Path(root) / name).mkdir(exist_ok=True)
            else:
                (Path(root) / name).write_text("")
        assert [x.step for x in list_saved(Path(root)) if x.complete] == [2]
        found, warnings = find_resume(Path(root), "auto")
        assert found == Path(root) / "step_2" and len(warnings) == ("step_3/" in names)
        assert prune(Path(root), keep_last=1, keep_best=0) == []
