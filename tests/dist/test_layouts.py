"""The parallel layout does not change the mathematics: real gloo ranks against transformers."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from gpg_megatron.batching.updates import make_batches, split_updates
from gpg_megatron.config.sections import Config
from gpg_megatron.model.flops import TokenCosts
from gpg_megatron.types import TrainBatch, TrainSample
from tests.dist.problem import (
    LAYOUTS,
    N_LAYERS,
    N_UPDATES,
    PROBLEMS,
    REPLAYED,
    TOKENS_PER_MICRO_BATCH,
    Layout,
    Problem,
    config_of,
    depends_on_ranks,
    make_model,
    make_samples,
    plan_of,
    problems_of,
    reference_name,
)
from tests.dist.ranks import run_ranks
from tests.dist.reference import load_reference, make_reference, save_reference

TOLERANCE = 1e-5

CASES = [(layout, problem) for layout in LAYOUTS for problem in problems_of(layout)]
each_case = pytest.mark.parametrize(
    ("layout", "problem"), CASES, ids=[f"{layout.name}-{problem.name}" for layout, problem in CASES]
)
# What a family has in common with the others is solved there; here the rest of its matrix.
DENSE = (Layout(tp=2), Layout(pp=2), Layout(cp=2), Layout(tp=2, pp=2))
ROUTED = (Layout(pp=2), Layout(pp=2, vpp=2), Layout(tp=2, pp=2), Layout(tp=2, dp=2, ep=2))
REST = {
    "Glm4Moe": ROUTED,
    "DeepseekV2": (Layout(tp=2), Layout(dp=2, ep=2), *ROUTED),
    "DeepseekV3": ROUTED,
    "Qwen2Moe": ROUTED,
    "Mistral": DENSE,
    "Glm4": DENSE,
    # Four ranks are more than there are heads of keys.
    "Qwen3_5": (Layout(pp=2), Layout(pp=2, vpp=2), Layout(dp=2), Layout(tp=2, pp=2), Layout(tp=4)),
    "Llama": (Layout(tp=2, pp=2, vpp=2),),
    "Qwen3Next": (
        Layout(tp=2),
        Layout(pp=2, vpp=2),
        Layout(pp=2),
        Layout(dp=2, ep=2),
        Layout(tp=2, pp=2),
        Layout(tp=2, dp=2, ep=2),
    ),
}
RARE = [
    (layout, problem)
    for problem in PROBLEMS
    for layout in REST.get(problem.family, ())
    if (layout, problem) not in CASES and (problem.replayed or problem.family != "Qwen2Moe")
]
each_problem = pytest.mark.parametrize("problem", PROBLEMS, ids=[p.name for p in PROBLEMS])

Verdicts = Callable[[Layout, Problem], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """<problem>/ with the model and reference.pt, for each problem."""
    root = tmp_path_factory.mktemp("layouts")
    for problem in PROBLEMS:
        prepare(root, problem, [x for x in LAYOUTS if problem in problems_of(x)])
    return root


def prepare(root: Path, problem: Problem, layouts: Sequence[Layout]) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # nothing here is large enough to share
    directory = root / problem.name
    make_model(problem, directory)
    updates = split_updates(make_samples(problem), N_UPDATES)
    for layout in {reference_name(problem, x): x for x in layouts}.values():
        reference = make_reference(config_of(problem, layout, directory), updates)
        save_reference(reference, directory / reference_name(problem, layout))
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def verdicts(folder: Path) -> Verdicts:
    """(layout, problem) -> what each rank saw. The layouts of a world size share its ranks,
    which run when the first of them is asked for."""
    run_world = functools.cache(functools.partial(run_ranks, folder, "tests.dist.layout_worker"))

    def read(layout: Layout, problem: Problem) -> list[dict[str, Any]]:
        output = run_world(layout.world_size, "cpu")
        place = folder / layout.name / problem.name
        paths = [place / f"rank{rank}.json" for rank in range(layout.world_size)]
        assert all(path.exists() for path in paths), output
        return [json.loads(path.read_text()) for path in paths]

    return read


@each_case
def test_a_layout_computes_what_one_process_computes(
    verdicts: Verdicts, layout: Layout, problem: Problem
) -> None:
    """Log-probs, loss, gradient norm, every gradient and every weight, over two updates."""
    for rank, verdict in enumerate(verdicts(layout, problem)):
        check(rank, verdict)


def check(rank: int, verdict: dict[str, Any]) -> None:
    wrong = {what: error for what, error in verdict["errors"].items() if not error <= TOLERANCE}
    assert not wrong, f"rank {rank}: {wrong}"
    assert verdict["uncovered"] == []
    assert verdict["stored_otherwise"] == []
    assert verdict["padding"] == 0.0
    assert verdict["changed_by_looking"] == []


@pytest.mark.slow
@pytest.mark.parametrize("layout", dict.fromkeys(x for x, _ in RARE), ids=lambda x: x.name)
def test_the_rest_of_the_matrix(tmp_path: Path, layout: Layout) -> None:
    problems = [problem for x, problem in RARE if x == layout]
    for problem in problems:
        prepare(tmp_path, problem, [layout])
    output = run_ranks(tmp_path, "tests.dist.layout_worker", layout.world_size, "cpu", layout.name)
    for problem in problems:
        paths = [*(tmp_path / layout.name / problem.name).glob("rank*.json")]
        assert len(paths) == layout.world_size, output
        for rank, path in enumerate(paths):
            check(rank, json.loads(path.read_text()))


@each_case
def test_an_update_without_a_live_sample_changes_nothing(
    verdicts: Verdicts, layout: Layout, problem: Problem
) -> None:
    """Weights and version stay on every rank; the update after it is compared above. With a KL or
    entropy term its samples have a gradient, and it is an update like the others."""
    every = problem.algorithm.needs_every_sample
    for verdict in verdicts(layout, problem):
        assert verdict["updated"] == [True, every, True]
        assert verdict["versions"] == ([1, 2, 3] if every else [1, 1, 2])
        assert verdict["changed_by_skipping"] == []


@each_case
def test_the_metrics_are_those_of_one_process(
    verdicts: Verdicts, layout: Layout, problem: Problem
) -> None:
    """Each token is counted once, whichever ranks share it."""
    (alone,) = verdicts(Layout(), problem)
    right = [] if depends_on_ranks(problem) and layout.dp > 1 else alone["metrics"]
    # A prompt is computed, and counted, in each micro-batch that has one of its samples.
    splits = layout.dp > 1 or layout.vpp > 1
    varying = ("policy/routing_missing", "policy/routing_differs") if splits else ()
    for verdict in verdicts(layout, problem):
        for got, expected in zip(verdict["metrics"], right, strict=False):
            for name in varying:
                got.pop(name, None)
            same = {name: value for name, value in expected.items() if name not in varying}
            assert got == pytest.approx(same, rel=1e-4, abs=1e-6)
            assert bool(got) == bool(expected)


@pytest.mark.parametrize("problem", REPLAYED, ids=[p.name for p in REPLAYED])
def test_replay_says_what_was_missing_and_what_differs(
    verdicts: Verdicts, problem: Problem
) -> None:
    """Random experts: of two, of six, the router prefers a third."""
    (alone,) = verdicts(Layout(), problem)
    first, _, last = alone["metrics"]
    assert 0.1 < first["policy/routing_missing"] < 0.9
    assert last["policy/routing_missing"] == 0.0
    for metrics in (first, last):
        assert metrics["policy/routing_differs"] == pytest.approx(1 - 2 / 6, abs=0.1)


@each_case
def test_an_update_that_is_not_finite_or_comes_too_late_changes_nothing(
    verdicts: Verdicts, layout: Layout, problem: Problem
) -> None:
    """They come before the others, which are compared above: the optimizer forgot them."""
    for verdict in verdicts(layout, problem):
        assert verdict["changed_by_bad"] == verdict["changed_by_held"] == []


@pytest.mark.parametrize("layout", [x for x in LAYOUTS if x.first], ids=lambda x: x.name)
def test_an_uneven_first_stage_holds_its_layers(verdicts: Verdicts, layout: Layout) -> None:
    assert layout.first is not None
    (problem,) = problems_of(layout)
    counts = [verdict["layers"] for verdict in verdicts(layout, problem)]
    assert counts == [layout.first] * layout.tp + [N_LAYERS - layout.first] * layout.tp


@each_problem
def test_the_reference_would_tell(folder: Path, problem: Problem) -> None:
    """What the tests above rule out is larger than their tolerance."""
    reference = load_reference(folder / problem.name / reference_name(problem, Layout()))
    assert reference.logprobs.std() > 0.5
    assert reference.margin > 10 * TOLERANCE, "rounding may choose another expert"
    first, *_, last = reference.updates
    for name in first.grads:  # state stays as it is
        right = first.weights[name]
        step = (last.weights[name] - right).abs().max() / right.abs().max()
        assert step > 50 * TOLERANCE, f"the last update hardly moves {name}"
    for update in (first, last):
        assert all(grad.any() for grad in update.grads.values())
        clipped = math.hypot(*(grad.norm().item() for grad in update.grads.values()))
        embedding = update.grads["model.embed_tokens.weight"].norm().item()
        assert math.hypot(clipped, embedding) > 1.01 * clipped, "counted twice, it would show"
    limit = problem.clip_grad or math.inf
    assert (first.grad_norm > limit) == (limit < 1.0), "some problems clip, some do not"


def test_the_samples_make_every_kind_of_micro_batch() -> None:
    """Over-long, several to a rank, and fillers for ranks without samples."""
    samples = make_samples(PROBLEMS[0])
    for n_ranks in {layout.dp for layout in LAYOUTS}:
        config = config_of(PROBLEMS[0], Layout(dp=n_ranks), Path("unused"))
        ranks = [_batches(samples, config, rank) for rank in range(n_ranks)]
        first, skipped, last = ([batches[i].micro_batches for batches in ranks] for i in range(3))
        assert not any(skipped)
        assert n_ranks == 4 or all(len(row) >= 2 for row in first)
        sizes = [len(batch.input_ids_T) for row in first for batch in row]
        assert max(sizes) > TOKENS_PER_MICRO_BATCH
        has_filler = any(not batch.loss_mask_T.any() for row in last for batch in row)
        assert has_filler == (n_ranks > 1)
        shared = {bool((batch.prompt_S >= 0).any()) for row in first for batch in row}
        assert shared == {True, False} or n_ranks == 4


def _batches(samples: Sequence[TrainSample], config: Config, rank: int) -> list[TrainBatch]:
    costs = TokenCosts(per_token=1.0, per_loss_token=0.0, per_pair=0.01)
    return make_batches(samples, plan_of(config, costs, rank))
