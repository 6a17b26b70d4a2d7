"""A policy that gives its memory away after every step learns the same, bit by bit."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gpg_megatron.layout.topology import PolicyGrid, local_shapes
from gpg_megatron.model.shape import load_model_shape
from gpg_megatron.placement.memory import policy_memory
from gpg_megatron.types import DTYPES
from tests.dist.checkpoint_problem import N_STEPS, problem_of, run_config
from tests.dist.offload_worker import CASES, PARTS, PIECE_BYTES, Case
from tests.dist.problem import N_LAYERS, Layout, make_model
from tests.dist.ranks import run_ranks

Verdicts = Callable[[Case], list[dict[str, Any]]]
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models of all cases."""
    root = tmp_path_factory.mktemp("offload")
    for problem in {p.name: p for p in (problem_of(case.layout) for case in CASES)}.values():
        make_model(problem, root / problem.name)
    return root


@pytest.fixture(scope="module")
def verdicts(folder: Path) -> Verdicts:
    """What each rank of a case saw. The cases of a world size share its ranks."""
    run_world = functools.cache(functools.partial(run_ranks, folder, "tests.dist.offload_worker"))

    def read(case: Case) -> list[dict[str, Any]]:
        output = run_world(case.layout.world_size)
        paths = [folder / f"{case.name}-rank{r}.json" for r in range(case.layout.world_size)]
        assert all(path.exists() for path in paths), output
        return [json.loads(path.read_text()) for path in paths]

    return read


@each_case
def test_results_weights_and_moments_are_those_of_a_policy_that_stays(
    verdicts: Verdicts, case: Case
) -> None:
    for verdict in verdicts(case):
        assert verdict["results"] and verdict["end"] == []
        assert verdict["moments"] > 0 and verdict["version"] == N_STEPS, "something was learned"


@each_case
def test_while_it_is_away_no_storage_has_a_byte(verdicts: Verdicts, case: Case) -> None:
    for verdict in verdicts(case):
        assert verdict["left"] == dict.fromkeys(PARTS, 0)
        assert min(verdict["resident"].values()) > 0
        assert not verdict["gradients_left"], "they are dropped"


@each_case
def test_a_part_is_packed_into_whole_pieces(verdicts: Verdicts, case: Case) -> None:
    """Of the optimizer, whose tensors are many; gradients take nothing on the host."""
    for verdict in verdicts(case):
        *whole, rest = verdict["pieces"]
        assert len(whole) > 5 and set(whole) == {PIECE_BYTES}
        # On CPU, Adam's step count of each parameter is there, too: four bytes.
        counts = sum(verdict["pieces"]) - verdict["resident"]["optimizer"]
        assert 0 <= counts <= 4 * verdict["moments"] and 0 < rest <= PIECE_BYTES


@each_case
def test_shards_that_the_bridge_holds_stay_valid(verdicts: Verdicts, case: Case) -> None:
    for verdict in verdicts(case):
        assert verdict["published"] == [] and verdict["changed_by_moving"] == []


@each_case
def test_a_save_may_be_offloaded_while_it_is_written(verdicts: Verdicts, case: Case) -> None:
    """Written without gradients on the device; the files have every bit of the last step."""
    for verdict in verdicts(case):
        assert verdict["resumed_at"] == N_STEPS
        assert verdict["saved"] == []


@each_case
def test_a_part_that_is_away_is_refused(verdicts: Verdicts, case: Case) -> None:
    for verdict in verdicts(case):
        assert verdict["refusal"] == (
            "parameters, gradients, optimizer of the policy are offloaded"
        )


@pytest.mark.parametrize("case", [c for c in CASES if c.layout == Layout()], ids=lambda c: c.name)
def test_the_dry_run_counts_the_bytes_that_are_moved(
    verdicts: Verdicts, folder: Path, case: Case
) -> None:
    problem = problem_of(case.layout)
    shape = load_model_shape(folder / problem.name)
    grid = PolicyGrid(tp_size=1, dp_size=1, pp_size=1, stage_of_layer=(0,) * N_LAYERS)
    n_parameters = sum(map(math.prod, local_shapes(shape, grid, 0).values()))
    config = run_config((case.layout, False), problem, folder, "unused")
    model = type(config.model)(path=config.model.path, dtype=case.dtype)
    config = type(config)(policy=config.policy, model=model)
    memory = policy_memory(config, shape, n_parameters=n_parameters, stage=0)
    (verdict,) = verdicts(case)
    assert verdict["resident"] == {part: getattr(memory, part) for part in PARTS}
    assert memory.parameters == n_parameters * DTYPES[case.dtype].itemsize
