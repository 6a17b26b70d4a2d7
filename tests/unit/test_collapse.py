"""The rule that ends a run which has collapsed."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gpg_megatron.checkpoint.marker import MARKER
from gpg_megatron.config.loading import load_config
from gpg_megatron.errors import UserError
from gpg_megatron.loop.checkpoints import RunCheckpoints
from gpg_megatron.loop.collapse import Collapsed, signs, verdict
from gpg_megatron.loop.collector import Rollout
from gpg_megatron.loop.trainer import Schedule
from gpg_megatron.types import StepResult, TrainSample
from tests.samples import float32, train_sample
from tests.unit.test_train_loop import World, run


def result(**metrics: float) -> StepResult:
    return StepResult(version=1, updated=True, loss=0.0, grad_norm=1.0, lr=1e-3, metrics=metrics)


def sample(*logprobs: float) -> TrainSample:
    return replace(train_sample(response=(3,) * len(logprobs)), rollout_logprobs=float32(logprobs))


def test_signs_by_hand() -> None:
    """Two answers of one and three tokens; the second update is the furthest off."""
    results = [result(**{"mismatch/kl_k3": 0.1}), result(**{"mismatch/kl_k3": 0.7}), result()]
    found = signs(0.25, [sample(-1.0), sample(-0.5, -0.5, 0.0)], results)
    assert found == {"accuracy": 0.25, "entropy": 0.5, "kl": 0.7}


def test_a_step_without_tokens_and_updates_shows_accuracy_only() -> None:
    assert signs(0.5, [sample()], [result()]) == {"accuracy": 0.5}


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ({"entropy": 0.1, "kl": 0.5, "accuracy": 0.2}, ""),
        ({"entropy": 0.099, "kl": 0.5}, "entropy is 0.099, at least 0.1"),
        ({"kl": 0.51}, "kl is 0.51, at most 0.5"),
        ({"accuracy": 0.1}, "accuracy is 0.1, at least 0.2"),
        ({"kl": math.nan}, "kl is nan"),
        ({}, ""),
    ],
)
def test_the_limits_themselves_are_allowed(found: dict[str, float], said: str) -> None:
    text = verdict(7, found, {"entropy": 0.1, "kl": 0.5, "accuracy": 0.2})
    assert said in text
    assert bool(text) == bool(said)


class Worse(World):
    """Every answer of the second step is wrong."""

    saved: Path | None = None

    def take(self) -> Rollout:
        rollout = super().take()
        wrong = {"reward/accuracy": 0.0}
        return replace(rollout, metrics=wrong) if self.step == 2 else rollout

    def newest(self) -> Path | None:
        return self.saved


@pytest.mark.parametrize(
    ("saved", "end"),
    [
        (Path("run/checkpoints/step_1"), "the last good checkpoint is run/checkpoints/step_1"),
        (None, "no checkpoint was saved before .checkpoint.save_freq."),
    ],
)
def test_the_run_ends_before_the_step_is_saved(saved: Path | None, end: str) -> None:
    schedule = Schedule(done=0, last=4, evaluate_first=False, evaluate_every=0)
    world = Worse("disaggregated", [True], schedule, save_every=1)
    world.saved = saved
    with pytest.raises(Collapsed, match=f"step 2: .* accuracy is 0, at least 0.25 .*{end}$"):
        run(world, stop_on={"accuracy": 0.25, "entropy": 1.0, "kl": 9.0})
    assert world.calls == ["take 1", "learn", "save 1", "report 1", "take 2", "learn"]
    assert world.rows[1]["stop/accuracy"] == 0.5 and world.rows[1]["stop/entropy"] == 1.0


def test_the_newest_checkpoint_is_one_that_is_whole(tmp_path: Path) -> None:
    for step, whole in ((2, True), (10, True), (11, False)):
        (tmp_path / f"step_{step}").mkdir()
        if whole:
            (tmp_path / f"step_{step}" / MARKER).write_text("{}")
    saving: Any = SimpleNamespace(root=tmp_path, config=SimpleNamespace(async_save=False))
    checkpoints = RunCheckpoints(saving, lambda action: action(), dict)
    assert checkpoints.newest() == tmp_path / "step_10"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.stop_on={entropi: 1}", "trainer.stop_on.entropi is unknown; expected entropy"),
        ("trainer.stop_on={kl: -1}", "trainer.stop_on.kl is -1.0; expected a number of at least 0"),
        ("trainer.stop_on={kl: .nan}", "trainer.stop_on.kl is nan"),
    ],
)
def test_a_limit_that_is_none_is_refused(override: str, message: str) -> None:
    given = ["model.path=m", "data.train_files=[t]", override]
    with pytest.raises(UserError, match=re.escape(message)):
        load_config(None, given)
    with pytest.raises(UserError, match="rollout.top_k cut the distribution"):
        load_config(None, [*given[:2], "trainer.stop_on={kl: 1}", "rollout.top_k=5"])
