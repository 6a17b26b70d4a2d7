"""The trainer's own loop over engines and a policy that only note what they are asked to do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from gpg_megatron.algorithm.redraw import Selection
from gpg_megatron.checkpoint.resume import ResumePoint
from gpg_megatron.config.sections import (
    CheckpointConfig,
    Config,
    DataConfig,
    ModelConfig,
    TrainerConfig,
    ValidationConfig,
)
from gpg_megatron.loop import trainer as module
from gpg_megatron.loop.rollouts import Rollout
from gpg_megatron.loop.trainer import Trainer
from gpg_megatron.rollout.engine import EngineSpec
from gpg_megatron.types import (
    Anchors,
    Completion,
    ParallelPosition,
    Prompt,
    Reward,
    ScoredGroup,
    StepResult,
    VersionSpan,
)
from tests.unit.test_bridge_hf_io import TIED

START = [
    "engines start",
    "engines ready",
    "engines sleep 2",
    "policy built",
    "policy loaded",
    "engines ready",
]
# Into the engines, and back to generating.
SEND = ["offload gradients optimizer", "engines wake weights"]
GENERATE = ["offload parameters", "engines wake kv_cache"]
READ = ["engines sleep 1", "load parameters optimizer"]
READ_AGAIN = ["offload parameters optimizer", "engines wake weights kv_cache"]
TRAIN = ["engines sleep 2", "load parameters gradients optimizer"]
VERIFIED = [*START, *SEND, "bridge planned", "publish 0", *GENERATE, "canary", *READ, "log-probs"]
RIGHT, WRONG = (Reward(score=x, accuracy=x, parts={}) for x in (1.0, 0.0))


def group(name: str, *, live: bool, version: int) -> ScoredGroup:
    prompt = Prompt(id=name, token_ids=(1, 2), messages=(), ground_truth="", data_source="d")
    completions = tuple(
        Completion(
            prompt_id=name,
            index=i,
            token_ids=(3, 4 + i),
            logprobs=(-1.0, -1.0),
            finish_reason="stop",
            text="",
            versions=(VersionSpan(version=version, start=0, end=2),),
        )
        for i in range(2)
    )
    return ScoredGroup(
        prompt=prompt, completions=completions, rewards=(RIGHT, RIGHT if not live else WRONG)
    )


class World:
    """Recorders in the place of everything that needs a process, and their common notes."""

    def __init__(self, live: Callable[[int], bool]) -> None:
        self.calls: list[str] = []
        self.version = 0
        self.live = live

    def note(self, text: str, result: Any = None) -> Callable[..., Any]:
        return lambda *_, **__: self.calls.append(text) or result

    def fleet(self, spec: EngineSpec, **_: Any) -> SimpleNamespace:
        self.calls.append("engines start")
        self.gives_memory_back = spec.gives_memory_back
        return SimpleNamespace(
            wait_ready=self.note("engines ready"),
            sleep=lambda level: self.calls.append(f"engines sleep {level}"),
            wake=lambda parts: self.calls.append(f"engines wake {' '.join(parts)}"),
            close=lambda: None,
        )

    def policy(self, *_: Any) -> SimpleNamespace:
        self.calls.append("policy built")
        self.made = SimpleNamespace(
            version=0,
            position=ParallelPosition(
                rank=0,
                world_size=1,
                tp_rank=0,
                tp_size=1,
                pp_rank=0,
                pp_size=1,
                dp_rank=0,
                dp_size=1,
            ),
            named_shards=dict,
            weights_loaded=self.note("policy loaded"),
            resume=self.resume,
            offload=lambda parts: self.calls.append(f"offload {' '.join(parts)}"),
            load=lambda parts: self.calls.append(f"load {' '.join(parts)}"),
            anchors=lambda batches: [Anchors()] * len(batches),
            train=self.train,
            logprobs=lambda batches: (
                self.calls.append("log-probs")
                or [b.rollout_logprobs_T[b.loss_mask_T] for b in batches]
            ),
        )
        return self.made

    def resume(self, _: Path, *, version: int, same_ranks: bool) -> None:
        self.calls.append("policy resumed")
        self.made.version = version

    def train(self, batch: Any, _: Anchors) -> StepResult:
        updated = bool(batch.micro_batches)
        self.made.version += updated
        self.calls.append("update" if updated else "no update")
        return StepResult(
            version=self.made.version, updated=updated, loss=0.5, grad_norm=1.0, lr=1e-3, metrics={}
        )

    def bridge(self, **_: Any) -> SimpleNamespace:
        self.calls.append("bridge planned")
        publish = lambda version: self.calls.append(f"publish {version}")  # noqa: E731
        return SimpleNamespace(publish=publish, close=lambda: None)

    def conductor(self, *_: Any) -> SimpleNamespace:
        pair = group("canary", live=True, version=0)
        return SimpleNamespace(
            canary=self.note("canary", [(pair.prompt, pair.completions[0])]),
            rollouts=SimpleNamespace(
                take=self.take, restore=self.note("stream resumed"), state=dict
            ),
            evaluate=lambda step: self.calls.append(f"evaluate {step}") or {},
            message=lambda text: None,
            report=lambda *_: None,
            finish=list,
            close=lambda: None,
        )

    def take(self, step: int) -> Rollout:
        self.calls.append(f"collect {step}")
        live = self.live(step)
        groups = tuple(group(f"p{i}", live=live, version=self.made.version) for i in range(2))
        selection = Selection(
            groups=groups, carried=(), n_filtered=0, exhausted=False, skipped=False
        )
        return Rollout(
            selection=selection,
            drawn=groups,
            redraws=0,
            n_carried=0,
            timings={"timing/rollout_s": 1.0},
        )

    def checkpoints(self, config: Config, *_: Any) -> SimpleNamespace:
        def save(step: int, *_: Any) -> None:
            if config.saves_at(step):
                self.calls.append(f"save {step}")

        return SimpleNamespace(poll=lambda: None, wait=lambda: None, save=save)


@pytest.fixture
def one_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def run(
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    *,
    placement: str = "colocated",
    live: Callable[[int], bool] = lambda step: True,
    resumed_at: int | None = None,
    before_train: bool = False,
    **trainer: Any,
) -> list[str]:
    """What the trainer asks for in a run of one rank; two samples to each of two prompts."""
    save_freq = trainer.pop("save_freq", 0)
    settings = {"total_training_steps": 2} | trainer
    config = Config(
        data=DataConfig(train_files=("unused",), val_files=("unused",)),
        model=ModelConfig(path="unused", dtype="fp32"),
        trainer=TrainerConfig(
            train_batch_size=2, placement=placement, output_dir=str(folder), **settings
        ),
        validation=ValidationConfig(before_train=before_train),
        checkpoint=CheckpointConfig(save_freq=save_freq),
    )
    config = replace(config, rollout=replace(config.rollout, n=2, max_response_length=4))
    world = World(live)
    point = None
    if resumed_at is not None:
        marker = SimpleNamespace(step=resumed_at, version=resumed_at, layout=None)
        point = ResumePoint(directory=folder, marker=marker)  # type: ignore[arg-type]
    for name, stand_in in {
        "Fleet": SimpleNamespace(start=world.fleet),
        "Policy": world.policy,
        "WeightBridge": world.bridge,
        "Conductor": world.conductor,
        "RunCheckpoints": world.checkpoints,
        "load_hf": lambda *_: None,
        "load_inputs": lambda *_: None,
        "find_resume_point": lambda *_: (point, []),
        "check_bytes": lambda *_: None,
        "read_trainer_state": lambda *_: {},
        "is_converted": lambda *_: False,
        "_peak_flops_per_s": lambda *_: 1e9,
    }.items():
        monkeypatch.setattr(module, name, stand_in)
    with Trainer(config, TIED, "cpu", "run") as it:
        it.run()
    assert world.gives_memory_back == (placement == "colocated")
    return world.calls


def test_steps_without_evaluation_between_them(one_rank, monkeypatch, tmp_path, capsys) -> None:
    assert run(monkeypatch, tmp_path) == [
        *VERIFIED,
        *(*READ_AGAIN, "collect 1", *TRAIN, "update", *SEND, "publish 1"),
        *(*GENERATE, "collect 2", *TRAIN, "update", *SEND, "publish 2"),
        *(*GENERATE, "evaluate 2"),
    ]
    assert "warning: trainer.placement=colocated saves no memory on CPU" in capsys.readouterr().err


def test_several_updates_of_a_step_stay_together(one_rank, monkeypatch, tmp_path) -> None:
    calls = run(monkeypatch, tmp_path, total_training_steps=1, mini_batch_size=1)
    begin = calls.index("collect 1")
    assert calls[begin:] == [
        *("collect 1", *TRAIN, "update", "update", *SEND, "publish 2", *GENERATE, "evaluate 1")
    ]


def test_a_step_that_learns_nothing_publishes_what_the_engines_dropped(
    one_rank, monkeypatch, tmp_path
) -> None:
    calls = run(monkeypatch, tmp_path, live=lambda step: step == 2)
    assert calls[len(VERIFIED) :] == [
        *(*READ_AGAIN, "collect 1", *TRAIN, "no update", *SEND, "publish 0"),
        *(*GENERATE, "collect 2", *TRAIN, "update", *SEND, "publish 1"),
        *(*GENERATE, "evaluate 2"),
    ]


def test_evaluations_and_saves_between_the_steps(one_rank, monkeypatch, tmp_path) -> None:
    calls = run(
        monkeypatch, tmp_path, total_training_steps=3, before_train=True, test_freq=2,
        save_freq=1,
    )  # fmt: skip
    only_optimizer = ["engines sleep 1", "load optimizer"]
    assert calls[len(VERIFIED) :] == [
        *(*READ_AGAIN, "evaluate 0"),
        *("collect 1", *TRAIN, "update", *SEND, "publish 1", *only_optimizer, "save 1"),
        *(*READ_AGAIN, "collect 2", *TRAIN, "update", *SEND, "publish 2"),
        *(*GENERATE, "evaluate 2", *READ, "save 2"),
        *(*READ_AGAIN, "collect 3", *TRAIN, "update", *SEND, "publish 3"),
        *(*GENERATE, "evaluate 3", *READ, "save 3"),
    ]


def test_a_resumed_run_begins_as_a_new_one(one_rank, monkeypatch, tmp_path) -> None:
    calls = run(monkeypatch, tmp_path, resumed_at=1)
    right = [
        {"policy loaded": "policy resumed", "publish 0": "publish 1"}.get(c, c) for c in VERIFIED
    ]
    right.insert(right.index("engines wake weights") - 1, "stream resumed")
    assert calls == [
        *(*right, *READ_AGAIN, "collect 2", *TRAIN, "update", *SEND, "publish 2"),
        *(*GENERATE, "evaluate 2"),
    ]


def test_disaggregated_moves_nothing_and_does_not_publish_in_vain(
    one_rank, monkeypatch, tmp_path, capsys
) -> None:
    calls = run(
        monkeypatch, tmp_path, placement="disaggregated", live=lambda step: step == 2, save_freq=1
    )
    assert calls == [
        *("engines start", "policy built", "policy loaded", "engines ready", "bridge planned"),
        *("publish 0", "canary", "log-probs"),
        *("collect 1", "no update", "save 1"),
        *("collect 2", "update", "publish 1", "evaluate 2", "save 2"),
    ]
    assert capsys.readouterr().err == ""
