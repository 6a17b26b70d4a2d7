"""The parallel layout does not change the mathematics: real gloo ranks against transformers."""

from __future__ import annotations

import functools
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gpg_megatron.batching import make_batches, split_updates
from tests.dist.problem import (
    LAYOUTS,
    PROBLEMS,
    TOKENS_PER_MICRO_BATCH,
    UPDATES,
    Layout,
    Problem,
    config_of,
    make_model,
    make_samples,
)
from tests.dist.reference import load_reference, make_reference, save_reference

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 300
TOLERANCE = 1e-5

each_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
each_problem = pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)

Verdicts = Callable[[Layout, Problem], list[dict]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """<problem>/ with the model and reference.pt, for each problem."""
    root = tmp_path_factory.mktemp("layouts")
    for problem in PROBLEMS:
        directory = root / problem.name
        make_model(problem, directory)
        config = config_of(problem, Layout(), directory)
        updates = split_updates(make_samples(problem), UPDATES)
        save_reference(make_reference(config, updates), directory / "reference.pt")
    return root


@pytest.fixture(scope="module")
def verdicts(folder: Path) -> Verdicts:
    """(layout, problem) -> what each rank found. All layouts of a world size share its ranks,
    which start when the first of them is asked for."""
    start = functools.cache(functools.partial(_run_world, folder))

    def read(layout: Layout, problem: Problem) -> list[dict]:
        output = start(layout.world_size)
        paths = [
            folder / layout.name / problem.name / f"rank{rank}.json"
            for rank in range(layout.world_size)
        ]
        assert all(path.exists() for path in paths), output
        return [json.loads(path.read_text()) for path in paths]

    return read


def _run_world(folder: Path, world_size: int) -> str:
    """Start the ranks and wait for their end; returns what they printed."""
    log = folder / f"world{world_size}.log"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={world_size}", "-m", "tests.dist.layout_worker", str(folder)]
    with log.open("w") as file:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    try:
        process.wait(timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        # Each rank has a session of its own; only the launcher can end them all.
        process.terminate()
        process.wait(timeout=60)
    return f"exit code {process.returncode}\n{log.read_text()}"


@each_layout
@each_problem
def test_a_layout_computes_what_one_process_computes(
    verdicts: Verdicts, layout: Layout, problem: Problem
) -> None:
    """Loss, log-probs, gradient norm, every gradient, every weight after each of two updates."""
    for rank, verdict in enumerate(verdicts(layout, problem)):
        wrong = {name: e for name, e in verdict["errors"].items() if not e <= TOLERANCE}
        assert not wrong, f"rank {rank}: {wrong}"
        assert verdict["uncovered"] == []
        assert verdict["padding"] == 0.0


@each_layout
@each_problem
def test_an_update_without_a_live_sample_changes_nothing(
    verdicts: Verdicts, layout: Layout, problem: Problem
) -> None:
    """Weights and version stay on every rank, and the next update is not disturbed."""
    for verdict in verdicts(layout, problem):
        assert verdict["updated"] == [True, False, True]
        assert verdict["versions"] == [1, 1, 2]
        assert verdict["skipped_changed"] == []
