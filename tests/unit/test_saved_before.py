"""Files of an earlier version: found, whole, converted, and gone on from."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from gpg_megatron.checkpoint.marker import damaged_file, read_marker
from gpg_megatron.checkpoint.resume import find_resume_point
from gpg_megatron.checkpoint.to_hf import megatron_to_hf
from gpg_megatron.loop.state import machine_from_json, read_state
from gpg_megatron.loop.stream import Rules, next_batch
from gpg_megatron.model.shape import load_model_shape
from tests.samples import plain
from tests.saved_before.problem import FOLDER, MODEL, STEP, config


def test_a_run_finds_its_checkpoint(tmp_path: Path) -> None:
    point, warnings = find_resume_point(config(2, tmp_path), load_model_shape(MODEL))
    assert point is not None and point.directory == STEP and warnings == []
    assert (point.marker.step, point.marker.version) == (2, 2)
    assert damaged_file(STEP, point.marker, list(point.marker.files)) is None


def test_the_loop_reads_what_it_remembered() -> None:
    state = read_state(STEP, 2)
    first, second, *drawn = state.groups
    machine = machine_from_json(state.values["machine"])
    assert [(g.weights, g.carried) for g in machine.ready[:3]] == [(0, True)] * 2 + [(1, False)]
    assert (machine.closed, machine.next_ticket) == (2, len(state.groups))
    # The batch that was drawn ahead is the next one that is taken.
    rules = Rules(size=4, staleness=1, last=4)
    assert len(next_batch(rules, machine) or ()) == len(state.groups)
    assert [first.prompt.id, second.prompt.id] == ["toy/2", "toy/1"] and len(drawn) >= 2
    completion = drawn[0].completions[0]
    assert plain(completion.logprobs) == ("float32", [-0.5]) and completion.versions[0].end == 1
    assert set(state.values["seconds"]) == {"timing/rollout_s", "timing/reward_s"}


def test_a_converted_model_gives_back_the_tensors(tmp_path: Path) -> None:
    assert read_marker(FOLDER / "converted").padded_vocab_size == 256
    megatron_to_hf(FOLDER / "converted", tmp_path / "hf")
    written, right = (load_file(d / "model.safetensors") for d in (tmp_path / "hf", MODEL))
    assert written.keys() == right.keys()
    assert all(torch.equal(written[name], right[name]) for name in right)


def test_a_training_checkpoint_is_exported(tmp_path: Path) -> None:
    megatron_to_hf(STEP, tmp_path / "hf")
    trained, before = (load_file(d / "model.safetensors") for d in (tmp_path / "hf", MODEL))
    assert trained.keys() == before.keys()
    moved = max((trained[name] - before[name]).abs().max().item() for name in before)
    assert 1e-2 <= moved <= 2.1e-2, "two updates of Adam at lr 1e-2"
