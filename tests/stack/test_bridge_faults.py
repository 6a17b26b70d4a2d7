"""Publishes that fail: every rank hears of it in time, half-updated weights are never used, and
the next publish mends it. One start of the engine serves all of it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gpg_megatron.host.reaper import new_run_id
from tests.stack.bridge_faults import BRIDGE_LIMIT_S
from tests.stack.test_bridge import launch
from tests.tiny import make_tiny_model

Notes = dict[str, dict[str, Any]]
"""What was tried -> how it ended on every rank."""


@pytest.fixture(scope="module")
def notes(tmp_path_factory: pytest.TempPathFactory) -> Notes:
    folder = tmp_path_factory.mktemp("faults")
    checkpoints = [
        str(make_tiny_model(folder / name, num_layers=8, hidden_size=256, num_heads=8, seed=seed))
        for seed, name in enumerate("AB")
    ]
    run_id = new_run_id()
    job = {
        "run_id": run_id,
        "checkpoints": checkpoints,
        "engine_tp": 1,
        "num_engines": 1,
        "replaces_lost": True,
        "transport": "auto",
        "dtype": "fp32",
        "extension": "tests.stack.faulty_receiver.FaultyReceiver",
        "bridge_timeout_s": BRIDGE_LIMIT_S,
        "out": str(folder / "notes.json"),
    }
    (folder / "job.json").write_text(json.dumps(job))
    launch(folder / "job.json", run_id, module="tests.stack.bridge_faults", world=2)
    return {note["what"]: note for note in json.loads((folder / "notes.json").read_text())}


def failed(note: dict[str, Any], within_s: float) -> str:
    """It failed on every rank in time; the error of rank 0."""
    assert all(has_failed and seconds < within_s for has_failed, seconds in note["ends"]), note
    return str(note["error"])


def worked(notes: Notes, publish: str, gap: str) -> None:
    assert notes[publish]["error"] is None, notes[publish]
    result = notes[gap]["result"]
    assert result is not None, notes[gap]
    assert result["gap"] < 1e-4
    assert result["versions"] == [result["published"]]


def test_the_first_publish_works(notes: Notes) -> None:
    worked(notes, "first", "first works")


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("raise", "the fault that was asked for"),
        ("damage", "arrived damaged"),
        ("last", "the fault that was asked for"),
    ],
)
def test_a_failing_receiver(notes: Notes, kind: str, words: str) -> None:
    error = failed(notes[kind], BRIDGE_LIMIT_S)
    assert "publishing version" in error and words in error
    assert "the weights are incomplete" in failed(notes[f"{kind} refuses"], BRIDGE_LIMIT_S)
    worked(notes, f"{kind} again", f"{kind} mended")


def test_a_receiver_that_is_too_slow(notes: Notes) -> None:
    error = failed(notes["sleep"], BRIDGE_LIMIT_S + 5)
    assert f"waited {BRIDGE_LIMIT_S} s for engine worker 0 to read" in error
    worked(notes, "sleep again", "sleep mended")


def test_an_engine_that_is_killed_in_the_middle(notes: Notes) -> None:
    """The publish waits for the one that takes its place, and sends everything to it."""
    worked(notes, "kill", "kill mended")
