"""Saving and resuming on real ranks: bit by bit under the same layout, within rounding under
another one; and a run that is killed again and again."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch
from safetensors.torch import load_file

from gpg_megatron.checkpoint.to_hf import megatron_to_hf
from gpg_megatron.checkpoint.to_megatron import hf_to_megatron
from gpg_megatron.layout.topology import PolicyGrid
from tests.dist.checkpoint_problem import (
    CHANGED,
    CONVERTED,
    EXACT,
    FAMILIES,
    FAMILY_VARIANT,
    HALF,
    N_STEPS,
    Variant,
    changed_name,
    problem_of,
    run_name,
)
from tests.dist.problem import N_LAYERS, Layout, Problem, make_model
from tests.dist.ranks import fork_ranks, run_ranks

TOLERANCE = 1e-5
N_KILLS = 16


class Read(Protocol):
    """(name, layout) -> what each rank saw."""

    def __call__(self, name: str, layout: Layout, phase: str = "first") -> list[dict[str, Any]]: ...


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models, and their converted checkpoints."""
    root = tmp_path_factory.mktemp("checkpoints")
    stages = tuple(i * 2 // N_LAYERS for i in range(N_LAYERS))
    for problem in (problem_of(Layout()), problem_of(Layout(dp=2, ep=2))):
        make_model(problem, root / problem.name)
        grid = PolicyGrid(tp_size=2, dp_size=1, pp_size=2, stage_of_layer=stages)
        hf_to_megatron(root / problem.name, root / f"{problem.name}-converted", grid=grid)
    return root


@pytest.fixture(scope="module")
def verdicts(folder: Path) -> Read:
    """Ranks start when the first of theirs is asked for;
    the second phase begins after all of the first."""

    @functools.cache
    def run(phase: str, world_size: int) -> str:
        return run_ranks(folder, "tests.dist.checkpoint_worker", world_size, phase)

    def read(name: str, layout: Layout, phase: str = "first") -> list[dict[str, Any]]:
        if phase == "changed":
            for size in (1, 2, 4):
                run("first", size)
        output = run(phase, layout.world_size)
        ranks = range(layout.world_size)
        paths = [folder / "verdicts" / f"{name}-rank{rank}.json" for rank in ranks]
        assert all(path.exists() for path in paths), output
        return [json.loads(path.read_text()) for path in paths]

    return read


@pytest.mark.parametrize("variant", EXACT, ids=lambda v: run_name(v, "exact"))
def test_a_resumed_run_is_the_uninterrupted_one(verdicts: Read, variant: Variant) -> None:
    """Weights, moments, results of every update and random numbers, bit by bit."""
    for verdict in verdicts(run_name(variant, "exact"), variant[0]):
        check_exact(verdict)


def check_exact(verdict: dict[str, Any]) -> None:
    assert verdict["resumed_at"] == HALF
    assert verdict["restored"] == [] and verdict["end"] == []
    assert verdict["results"] and verdict["draws"]
    assert verdict["moments"] >= 3 and verdict["version"] == N_STEPS


@pytest.mark.slow
@pytest.mark.parametrize("problem", FAMILIES, ids=lambda x: x.name)
def test_a_resumed_run_of_a_family_is_the_uninterrupted_one(
    tmp_path: Path, problem: Problem
) -> None:
    """Of those that have state, latent attention or gated delta nets."""
    make_model(problem, tmp_path / problem.name)
    layout, _ = FAMILY_VARIANT
    output = run_ranks(
        tmp_path, "tests.dist.checkpoint_worker", layout.world_size, "family", problem.name
    )
    name = run_name(FAMILY_VARIANT, "exact", problem)
    paths = [*(tmp_path / "verdicts").glob(f"{name}-rank*.json")]
    assert len(paths) == layout.world_size, output
    for path in paths:
        check_exact(json.loads(path.read_text()))


@pytest.mark.parametrize("layout", CONVERTED, ids=lambda x: x.name)
@pytest.mark.parametrize("model", ["qwen2-tied", "qwen3moe-tied"])
def test_a_converted_checkpoint_fills_every_layout(
    verdicts: Read, layout: Layout, model: str
) -> None:
    for verdict in verdicts(f"{layout.name}-{model}-converted", layout):
        assert verdict["different"] == [] and verdict["tensors"] > 5


@pytest.mark.parametrize(("first", "second"), CHANGED, ids=[changed_name(*c) for c in CHANGED])
def test_a_run_goes_on_under_another_layout(
    verdicts: Read, folder: Path, tmp_path: Path, first: Variant, second: Variant
) -> None:
    name = changed_name(first, second)
    right = verdicts(run_name(first, "exact"), first[0])[0]["second_half"]
    for verdict in verdicts(name, second[0], phase="changed"):
        assert verdict["resumed_at"] == HALF
        for found, expected in zip(verdict["results"], right, strict=True):
            assert found == pytest.approx(expected, rel=TOLERANCE)
    ends = []
    for run in (run_name(first, "whole"), name):
        target = tmp_path / run
        megatron_to_hf(folder / run / "checkpoints" / f"step_{N_STEPS}", target)
        ends.append(load_file(target / "model.safetensors"))
    begin = load_file(folder / problem_of(first[0]).name / "model.safetensors")
    for key, expected in ends[0].items():
        error = (ends[1][key] - expected).abs().max() / expected.abs().max()
        assert error <= TOLERANCE, key
        assert not torch.equal(expected, begin[key]), f"training does not move {key}"


def test_killed_at_any_moment(folder: Path) -> None:
    """Two ranks with a distributed optimizer, killed 16 times while they save; every resume finds
    a whole checkpoint, and exactly what the run had at that step."""
    log = folder / "kills.log"
    module, arguments = "tests.dist.checkpoint_kills", (str(folder), str(N_KILLS))
    assert fork_ranks(module, arguments, 1, log, limit_s=500) == [0], log.read_text()
    verdict = json.loads((folder / "kills.json").read_text())
    assert verdict["kills"] == N_KILLS
    assert verdict["wrong"] == []
    assert verdict["resumed"] > N_KILLS // 2, "too few lives got as far as a resume"
    assert verdict["incomplete"] > 0, "no kill hit a save; the test proves nothing"
