"""Which checkpoints count, which are damaged, which may go."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from gpg_megatron.checkpoint.marker import (
    MARKER,
    Marker,
    check_same_model,
    check_sizes,
    damaged_file,
    read_marker,
    stamp,
    write_marker,
)
from gpg_megatron.checkpoint.store import (
    copy_hf_files,
    find_resume,
    list_saved,
    prune,
    relative_files,
)
from gpg_megatron.errors import UserError


def save(root: Path, step: int, metric: float | None = None, *, complete: bool = True) -> Path:
    """A checkpoint with two files."""
    directory = root / f"step_{step}"
    (directory / "rng").mkdir(parents=True)
    (directory / "data.distcp").write_bytes(b"x" * 100)
    (directory / "rng" / "rank_0").write_bytes(b"y")
    if complete:
        write_marker(directory, marker(directory, step, metric))
    return directory


def marker(directory: Path, step: int = 1, metric: float | None = None) -> Marker:
    return Marker(
        step=step,
        version=2 * step,
        model={"architecture": "Qwen2ForCausalLM", "num_layers": 2},
        padded_vocab_size=384,
        dtype="bfloat16",
        has_optimizer=True,
        distributed_optimizer=False,
        layout={"tp": 1, "pp": 1, "dp": 1, "ep": 1},
        metric=metric,
        files={name: stamp(directory / name) for name in relative_files(directory)},
    )


def test_a_marker_comes_back_as_it_was_written(tmp_path: Path) -> None:
    directory = save(tmp_path, 3, 0.5)
    found = read_marker(directory)
    (directory / MARKER).unlink()
    assert found == marker(directory, 3, 0.5)
    assert list(found.files) == ["data.distcp", "rng/rank_0"]


def test_the_newest_complete_one_is_used_and_newer_remains_are_named(tmp_path: Path) -> None:
    assert find_resume(tmp_path, "auto") == (None, [])
    save(tmp_path, 9)
    right = save(tmp_path, 10)
    save(tmp_path, 11, complete=False)
    (tmp_path / "step_12").mkdir()
    (tmp_path / "step_x").mkdir()
    found, warnings = find_resume(tmp_path, "auto")
    assert found == right
    assert warnings == [
        f"{tmp_path / name} is incomplete: its save was cut off; it is not used"
        for name in ("step_12", "step_11")
    ]
    assert [s.step for s in list_saved(tmp_path)] == [9, 10, 11, 12]


def test_what_resume_asks_for(tmp_path: Path) -> None:
    assert find_resume(tmp_path, "never") == (None, [])
    directory = save(tmp_path, 1)
    assert find_resume(tmp_path, "auto") == (directory, [])
    assert find_resume(tmp_path / "other", str(directory)) == (directory, [])
    with pytest.raises(UserError, match=r"checkpoint\.resume=never, but .* has checkpoints"):
        find_resume(tmp_path, "never")


@pytest.mark.parametrize(
    ("keep_last", "keep_best", "stays"),
    [
        (None, 0, [1, 2, 3, 4, 5, 6]),
        (1, 0, [6]),
        (2, 0, [5, 6]),
        (1, 1, [3, 6]),
        (1, 2, [2, 3, 6]),
        (3, 1, [3, 4, 5, 6]),
        (9, 9, [2, 3, 4, 5, 6]),
    ],
)
def test_pruning(tmp_path: Path, keep_last: int | None, keep_best: int, stays: list[int]) -> None:
    """Step 1 is incomplete, 3 the best, 2 the newer of two equals with 5."""
    save(tmp_path, 1, complete=False)
    for step, metric in ((2, 0.7), (3, 0.9), (4, 0.1), (5, None), (6, 0.2)):
        save(tmp_path, step, metric)
    gone = prune(tmp_path, keep_last, keep_best)
    assert [s.step for s in list_saved(tmp_path)] == stays
    assert sorted(p.name for p in gone) == [f"step_{n}" for n in range(1, 7) if n not in stays]


def test_a_save_that_is_being_written_is_not_pruned(tmp_path: Path) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    save(tmp_path, 3, complete=False)
    prune(tmp_path, 1, 0)
    assert [s.step for s in list_saved(tmp_path)] == [2, 3]


def test_damage_is_found(tmp_path: Path) -> None:
    directory = save(tmp_path, 1)
    found = read_marker(directory)
    check_sizes(directory, found)
    assert damaged_file(directory, found, sorted(found.files)) is None
    data = bytearray((directory / "data.distcp").read_bytes())
    data[57] ^= 4
    (directory / "data.distcp").write_bytes(data)
    check_sizes(directory, found)
    assert damaged_file(directory, found, ["rng/rank_0"]) is None
    assert damaged_file(directory, found, sorted(found.files)) == (
        f"{directory / 'data.distcp'} is damaged: its bytes are not those that were saved"
    )
    os.truncate(directory / "data.distcp", 99)
    with pytest.raises(UserError, match="has 99 bytes; expected 100"):
        check_sizes(directory, found)
    (directory / "rng" / "rank_0").unlink()
    (directory / "data.distcp").write_bytes(b"x" * 100)
    with pytest.raises(UserError, match="rng/rank_0 is missing"):
        check_sizes(directory, found)


def test_markers_that_are_not_ours(tmp_path: Path) -> None:
    directory = save(tmp_path, 1)
    text = (directory / MARKER).read_text()
    for wrong, message in (
        (text.replace('"format": 1', '"format": 2'), "has format 2; this version reads format 1"),
        (text.replace('"step": 1', '"step": 7'), "damaged, its digest does not fit"),
        (text[: len(text) // 2], "damaged"),
        ("[]", "damaged"),
    ):
        (directory / MARKER).write_text(wrong)
        with pytest.raises(UserError, match=message):
            read_marker(directory)
    (directory / MARKER).unlink()
    with pytest.raises(UserError, match="its save was cut off, or it is no checkpoint"):
        read_marker(directory)
    with pytest.raises(UserError, match="no such checkpoint"):
        read_marker(tmp_path / "step_77")


def test_another_model_is_refused(tmp_path: Path) -> None:
    from tests.unit.test_bridge_hf_io import TIED, UNTIED

    directory = save(tmp_path, 1)
    found = read_marker(directory)
    import dataclasses

    same = dataclasses.replace(found, model=json.loads(json.dumps(dataclasses.asdict(TIED))))
    check_same_model(directory, same, TIED)
    with pytest.raises(UserError, match=r"another model: tied is True, in model\.path False"):
        check_same_model(directory, same, UNTIED)


def test_what_belongs_to_a_model_besides_its_weights(tmp_path: Path) -> None:
    source = tmp_path / "hf"
    source.mkdir()
    carried = [
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer.model",
        "merges.txt",
        "chat_template.jinja",
        "LICENSE",
    ]
    for name in (*carried, "model.safetensors", "model.safetensors.index.json", "x.bin", "m.py"):
        (source / name).write_text("{}")
    template = "additional_chat_templates/tool_use.jinja"
    (source / template).parent.mkdir()
    (source / template).write_text("")
    copy_hf_files(source, tmp_path / "target")
    assert relative_files(tmp_path / "target") == sorted([*carried, template])
