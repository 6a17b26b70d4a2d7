"""The loop over parts that only look: is the memory there that they need, are the weights right?"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpg_megatron.batching.updates import BatchPlan
from gpg_megatron.checkpoint.marker import Marker, read_marker
from gpg_megatron.config.algorithm import AlgorithmConfig
from gpg_megatron.config.sections import CheckpointConfig, Config, TrainerConfig
from gpg_megatron.errors import UserError
from gpg_megatron.loop.checkpoints import RunCheckpoints, Saving
from gpg_megatron.loop.collector import Rollout
from gpg_megatron.loop.generating import Generating
from gpg_megatron.loop.guard import Guard
from gpg_megatron.loop.inputs import Inputs
from gpg_megatron.loop.rank0 import Rank0
from gpg_megatron.loop.state import LoopState, read_state
from gpg_megatron.loop.trainer import Run, Schedule, train
from gpg_megatron.model.flops import TokenCosts
from gpg_megatron.observe.metrics import rollout_metrics
from gpg_megatron.observe.watchdog import Watchdog
from gpg_megatron.placement.states import Action, Load, Mode, Offload, Placement, Sleep, State, Wake
from gpg_megatron.types import (
    Completion,
    MicroBatch,
    Prompt,
    Reward,
    ScoredGroup,
    StepResult,
    TrainBatch,
    VersionSpan,
)
from tests.samples import float32, int32

T = TypeVar("T")
PLAN = BatchPlan(
    algorithm=AlgorithmConfig(),
    n_updates=1,
    max_tokens=64,
    max_response_length=4,
    dp_rank=0,
    dp_size=1,
    costs=TokenCosts(per_token=1.0, per_loss_token=1.0, per_pair=1.0),
    share_prompts=True,
)
SAVE_S = 0.02


def group(name: str, *, live: bool, version: int) -> ScoredGroup:
    prompt = Prompt(id=name, token_ids=int32((1, 2)), messages=(), ground_truth="", data_source="d")
    completions = tuple(
        Completion(
            prompt_id=name,
            index=i,
            token_ids=int32((3, 4 + i)),
            logprobs=float32((-1.0, -1.0)),
            finish_reason="stop",
            text="",
            versions=(VersionSpan(version=version, start=0, end=2),),
        )
        for i in range(2)
    )
    rewards = (Reward(score=1.0, accuracy=1.0, parts={}),) * 2
    if live:
        rewards = (rewards[0], Reward(score=0.0, accuracy=0.0, parts={}))
    return ScoredGroup(prompt=prompt, completions=completions, rewards=rewards)


class World:
    """Engines, policy and disk of one rank; each call checks what it needs."""

    def __init__(self, mode: Mode, live: Sequence[bool], schedule: Schedule, save_every: int):
        self.mode = mode
        self.live = live
        self.schedule = schedule
        self.save_every = save_every
        self.resident: set[str] = {"weights", "kv_cache"}
        self.calls: list[str] = []
        self.rows: dict[int, Mapping[str, float]] = {}
        self.version = schedule.done
        self.in_engines: int | None = None
        self.n_published = 0
        self.leaves_at = 1000
        """The version from which on the run is asked to leave."""
        self.step = schedule.done
        self.lost_in = -1
        """The step in whose evaluation all engines are lost, and others take their place."""
        self.waits_for_weights = False
        self._have_weights = threading.Event()

    def perform(self, action: Action) -> None:
        """Engines and policy never hold more than the table of states allows."""
        if isinstance(action, Sleep):
            self.resident -= {"weights", "kv_cache"}
            if action.level == 2:
                self.in_engines = None
        elif isinstance(action, Offload):
            self.resident -= set(action.parts)
        else:
            assert isinstance(action, Load | Wake)
            self.resident |= set(action.parts)

    def needs(self, *parts: str) -> None:
        assert self.mode == "disaggregated" or set(parts) <= self.resident, self.calls

    # ---- policy and bridge
    def learn(self, batches: Sequence[TrainBatch]) -> list[StepResult]:
        self.needs("parameters", "gradients", "optimizer")
        self.calls.append("learn")
        results = []
        for batch in batches:
            updated = bool(batch.micro_batches)
            self.version += updated
            results.append(
                StepResult(
                    version=self.version,
                    updated=updated,
                    loss=0.5,
                    grad_norm=1.0,
                    lr=1e-3,
                    metrics={},
                )
            )
        return results

    def logprobs(self, batches: Sequence[MicroBatch]) -> list[Any]:
        self.needs("parameters")
        return [batch.rollout_logprobs_T[batch.loss_mask_T] for batch in batches]

    def rounded_logprobs(
        self, batches: Sequence[MicroBatch], dtype: torch.dtype, seed: int
    ) -> list[Any]:
        return self.logprobs(batches)

    def publish(self, version: int) -> None:
        self.needs("parameters", "weights")
        assert version == self.version
        self.in_engines = version
        self.n_published += 1
        self.waits_for_weights = False
        self._have_weights.set()

    # ---- rollouts
    def take(self) -> Rollout:
        self.generates()
        step = self.step = self.step + 1
        self.calls.append(f"take {step}")
        live = self.live[(step - 1) % len(self.live)]
        groups = tuple(group(f"p{i}", live=live, version=self.version) for i in range(2))
        return Rollout(
            groups=groups,
            skipped=False,
            metrics=rollout_metrics(groups),
            timings={"timing/rollout_s": 1.0},
        )

    def updating(self) -> AbstractContextManager[None]:
        """Nothing is in flight."""
        return nullcontext()

    evaluating = updating

    def generates(self) -> None:
        self.needs("weights", "kv_cache")
        assert self.in_engines == self.version, "the engines have other weights"

    # ---- rank 0
    def canary(self) -> list[tuple[Prompt, Completion]]:
        self.generates()
        one = group("canary", live=True, version=self.version)
        return [(one.prompt, one.completions[0])]

    def evaluate(self, step: int) -> dict[str, float]:
        if step == self.lost_in:
            self.in_engines = None
            self._have_weights.clear()
            self.waits_for_weights = True
            assert self._have_weights.wait(20), "nobody published"
        self.generates()
        self.calls.append(f"evaluate {step}")
        return {"eval/d/mean@1": step / 10}

    def report(self, step: int, metrics: Mapping[str, float], *_: object) -> None:
        self.calls.append(f"report {step}")
        self.rows[step] = dict(metrics)

    def message(self, text: str) -> None: ...

    def warn_of_shaped_scores(self, *_: object) -> None: ...

    def finish(self, left_because: str) -> None:
        self.calls.append(left_because or "finish")

    def asked_to_leave(self) -> str:
        return "asked" if self.version >= self.leaves_at else ""

    # ---- disk
    def saves_at(self, step: int, leaves: bool) -> bool:
        return self.save_every > 0 and (leaves or step % self.save_every == 0)

    def save_at(self, step: int, _: object, evals: Mapping[str, float], leaves: bool) -> None:
        if self.saves_at(step, leaves):
            self.needs("parameters", "optimizer")
            assert bool(evals) is self.schedule.evaluates_at(step)
            self.calls.append(f"save {step}")
            time.sleep(SAVE_S)


def run(
    world: World, folder: Path = Path("unused"), stop_on: Mapping[str, float] | None = None
) -> list[str]:
    """Train in that world, from where the parts have been built; what was called."""
    any_world = cast(Any, world)
    placement = Placement(world.mode, world.perform)
    placement.enter(State.POLICY)
    world.resident |= {"parameters", "gradients", "optimizer"}
    placement.enter(State.SYNC)
    guard = Guard(
        tolerance=None,
        coarser=torch.float32,
        judges_rollouts=True,
        draws_ahead=False,
        max_bad_steps=3,
        samples_file=folder / "bad.jsonl",
        say=world.message,
        is_rank0=True,
    )
    with closing(Watchdog(rank=0, limit_s=60)) as watchdog:
        train(
            Run(
                schedule=world.schedule,
                algorithm=AlgorithmConfig(),
                plan=PLAN,
                policy=any_world,
                placement=placement,
                bridge=any_world,
                rollouts=any_world,
                checkpoints=any_world,
                guard=guard,
                watchdog=watchdog,
                on_rank0=lambda action: action(),
                generating=Generating(any_world, lambda action: action()),
                rank0=any_world,
                peak_flops_per_s=1e9,
                trace=lambda step: nullcontext(),
                stop_on=stop_on or {},
                asked_to_leave=world.asked_to_leave,
            )
        )
    return world.calls


@settings(max_examples=60, deadline=None)
@given(
    mode=st.sampled_from(["colocated", "disaggregated"]),
    live=st.lists(st.booleans(), min_size=1, max_size=3),
    done=st.integers(0, 2),
    n_steps=st.integers(1, 4),
    evaluate_first=st.booleans(),
    evaluate_every=st.integers(0, 3),
    save_every=st.integers(0, 2),
)
def test_every_part_finds_what_it_needs_and_comes_in_its_turn(
    mode: Mode,
    live: list[bool],
    done: int,
    n_steps: int,
    evaluate_first: bool,
    evaluate_every: int,
    save_every: int,
) -> None:
    schedule = Schedule(
        done=done,
        last=done + n_steps,
        evaluate_first=evaluate_first,
        evaluate_every=evaluate_every,
    )
    world = World(mode, live, schedule, save_every)
    expected = ["evaluate 0", "report 0"] if evaluate_first and not done else []
    for step in range(done + 1, done + n_steps + 1):
        expected += [f"take {step}", "learn"]
        last = step == done + n_steps
        if last or (evaluate_every and step % evaluate_every == 0):
            expected.append(f"evaluate {step}")
        if save_every and step % save_every == 0:
            expected.append(f"save {step}")
        expected.append(f"report {step}")
    assert run(world) == [*expected, "finish"]
    n_learned = world.version - done
    assert world.n_published == 1 + (n_steps if mode == "colocated" else n_learned)


def test_engines_that_are_lost_while_they_generate_get_the_same_weights_again() -> None:
    schedule = Schedule(done=0, last=3, evaluate_first=False, evaluate_every=1)
    worlds = [World("disaggregated", [True], schedule, save_every=1) for _ in range(2)]
    worlds[1].lost_in = 2
    assert run(worlds[1]) == run(worlds[0])
    assert worlds[1].n_published == worlds[0].n_published + 1


@pytest.mark.parametrize("mode", ["colocated", "disaggregated"])
def test_a_run_that_is_asked_to_leave_finishes_the_step_and_saves(mode: Mode) -> None:
    schedule = Schedule(done=0, last=9, evaluate_first=False, evaluate_every=0)
    world = World(mode, [True], schedule, save_every=5)
    world.leaves_at = 2
    calls = ["take 1", "learn", "report 1", "take 2", "learn", "save 2", "report 2", "asked"]
    assert run(world) == calls
    again = World(mode, [True], replace(schedule, done=2), save_every=5)
    again.leaves_at = 0
    assert run(again) == ["asked"], "before its first step: nothing is to be saved"
    last = World(mode, [True], replace(schedule, last=2), save_every=0)
    last.leaves_at = 2
    assert run(last)[-1] == "finish", "there is nothing left to leave"


def test_the_time_of_a_save_and_the_evaluation_are_in_the_row_of_their_step() -> None:
    schedule = Schedule(done=0, last=3, evaluate_first=False, evaluate_every=2)
    world = World("disaggregated", [True], schedule, save_every=3)
    run(world)
    seconds = {step: row["timing/checkpoint_s"] for step, row in world.rows.items()}
    assert seconds[3] >= SAVE_S > max(seconds[1], seconds[2])
    measured = {step: row.get("eval/d/mean@1") for step, row in world.rows.items()}
    assert measured == {1: None, 2: 0.2, 3: 0.3}


class WrittenAtOnce:
    """A policy whose checkpoint is there when save returns."""

    version = 4

    def save(self, directory: Path, _: object, finish: Callable[[], None]) -> None:
        (directory / "data.distcp").write_bytes(b"data")
        finish()


def test_the_best_of_three_steps_is_kept_for_its_own_metric(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    saving = Saving(
        config=CheckpointConfig(save_freq=1, keep_last=1, keep_best=1, best_metric="eval/d/mean@1"),
        root=tmp_path / "checkpoints",
        export_root=tmp_path / "hf",
        last_step=3,
        model_files=tmp_path / "model",
        config_yaml="",
        marker=partial(
            Marker,
            model={},
            padded_vocab_size=128,
            dtype="float32",
            has_optimizer=True,
            distributed_optimizer=False,
            layout={},
        ),
    )
    checkpoints = RunCheckpoints(
        saving, lambda action: action(), lambda: LoopState(values={"stream": 7}, groups=())
    )
    for step, accuracy in ((1, 0.1), (2, 0.9), (3, 0.5)):
        checkpoints.save_at(step, cast(Any, WrittenAtOnce()), {"eval/d/mean@1": accuracy})
    kept = {path.name: read_marker(path).metric for path in saving.root.iterdir()}
    assert kept == {"step_2": 0.9, "step_3": 0.5}
    assert read_state(saving.root / "step_2", 2).values == {"stream": 7}


def rank0_that_says(said: list[str], config: Config, n_filtered: int = 0) -> Rank0:
    none = cast(Any, None)
    return Rank0(
        config=config,
        inputs=Inputs(
            train_prompts=(), val_prompts=(), per_file=(), n_filtered=n_filtered, warnings=()
        ),
        fleet=none,
        pool=none,
        logger=none,
        progress=cast(Any, SimpleNamespace(message=said.append)),
        pids=(),
        gpu_metrics=dict,
    )


@pytest.mark.parametrize(("n_filtered", "n_lines"), [(3, 1), (0, 0)])
def test_prompts_that_are_left_out_are_said(n_filtered: int, n_lines: int) -> None:
    said: list[str] = []
    rank0_that_says(said, Config(), n_filtered).say_what_was_decided()
    assert said.pop(0) == "off-policy correction: none, every answer is of the present weights"
    assert len(said) == n_lines
    assert all(line.startswith("3 training prompts exceed data.max_prompt_length") for line in said)


def test_a_run_that_leaves_before_its_first_step_has_nothing_to_report(tmp_path: Path) -> None:
    said: list[str] = []
    (tmp_path / "metrics.jsonl").touch()
    rank0 = rank0_that_says(said, Config(trainer=TrainerConfig(output_dir=str(tmp_path))))
    rank0.finish("asked by SIGTERM")
    assert said == ["left in order: asked by SIGTERM; started again, the run goes on"]
    with pytest.raises(UserError, match="has no rows"):
        rank0.finish("")
