"""Rollout batches in turn and one step ahead; the engine and the scorers are stand-ins that can be
held and made to fail at will."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gpg_megatron.config.algorithm import AlgorithmConfig
from gpg_megatron.config.sections import Config, RolloutConfig, TrainerConfig
from gpg_megatron.data.stream import PromptStream
from gpg_megatron.loop.rollouts import Collector, Rollout
from gpg_megatron.loop.state import read_state, write_state
from gpg_megatron.observe.watchdog import Watchdog
from gpg_megatron.rollout.sampling import SamplingRequest
from gpg_megatron.types import Completion, Prompt, Reward, ScoredGroup, VersionSpan
from tests.samples import float32, int32, plain

PROMPTS = [
    Prompt(id=f"toy/{i}", token_ids=int32((1, 2)), messages=(), ground_truth="", data_source="toy")
    for i in range(10)
]


class Engines:
    """Answers at once, with the version that it has, unless it is held."""

    def __init__(self) -> None:
        self.version = 0
        self.requests: list[list[tuple[str, int]]] = []
        self.may_go = threading.Event()
        self.may_go.set()
        self.failure: Exception | None = None

    def generate(self, requests: Sequence[SamplingRequest]) -> list[Completion]:
        assert self.may_go.wait(20), "held for 20 s"
        if self.failure:
            raise self.failure
        self.requests.append([(r.prompt.id, r.params.seed) for r in requests])
        return [
            Completion(
                prompt_id=r.prompt.id,
                index=index,
                token_ids=int32((r.params.seed % 97,)),
                logprobs=float32((-0.5,)),
                finish_reason="stop",
                text="",
                versions=(VersionSpan(version=self.version, start=0, end=1),),
            )
            for r in requests
            for index in range(r.params.n)
        ]


class Scorers:
    """Every third prompt's group is dead."""

    def score(self, pairs: Sequence[tuple[Prompt, Sequence[Completion]]]) -> list[ScoredGroup]:
        groups = []
        for prompt, completions in pairs:
            live = int(prompt.id.split("/")[1]) % 3 > 0
            rewards = [Reward(score=s, accuracy=s, parts={}) for s in (float(live), 0.0)]
            groups.append(
                ScoredGroup(prompt=prompt, completions=tuple(completions), rewards=tuple(rewards))
            )
        return groups


CONFIG = Config(
    rollout=RolloutConfig(n=2),
    trainer=TrainerConfig(train_batch_size=4, seed=5),
    algorithm=AlgorithmConfig(beta_th=1.0, max_redraws=3),
)


def learned_from(rollout: Rollout) -> Any:
    """Everything but the seconds."""
    return plain(replace(rollout, timings={}))


Make = Callable[[], tuple[Collector, Engines]]


@pytest.fixture
def make() -> Iterator[Make]:
    watchdog = Watchdog(rank=0, limit_s=60)

    def build() -> tuple[Collector, Engines]:
        engines: Any = Engines()
        scorers: Any = Scorers()
        stream = PromptStream(PROMPTS, seed=5, shuffle=True)
        return Collector(CONFIG, stream, engines, scorers, watchdog), engines

    yield build
    watchdog.close()


def test_a_batch_that_was_begun_is_the_batch_that_is_drawn_in_turn(make: Make) -> None:
    in_turn, _ = make()
    ahead, _ = make()
    for step in range(1, 6):
        rollout, expected = ahead.take(step), in_turn.take(step)
        ahead.begin(step + 1)
        assert learned_from(rollout) == learned_from(expected)
        assert set(rollout.timings) == {"timing/rollout_s", "timing/reward_s"}
        ahead.wait()


def test_it_is_drawn_while_the_caller_does_something_else(make: Make) -> None:
    collector, engines = make()
    engines.may_go.clear()
    collector.begin(1)  # returns although the engines are held
    engines.may_go.set()
    collector.wait()
    engines.version = 7  # a publish after wait() does not reach what was drawn
    spans = [c.versions for group in collector.take(1).groups for c in group.completions]
    assert {span.version for (span,) in spans} == {0}


def test_one_batch_at_a_time(make: Make) -> None:
    collector, _ = make()
    collector.begin(1)
    with pytest.raises(AssertionError, match="one batch"):
        collector.begin(2)


@pytest.mark.parametrize("how", ["wait", "take", "state"])
def test_what_fails_in_the_thread_is_raised_where_the_batch_is_used(make: Make, how: str) -> None:
    collector, engines = make()
    engines.failure = TimeoutError("engine 0 does not answer")
    collector.begin(1)
    uses: dict[str, Callable[[], object]] = {
        "wait": collector.wait,
        "state": collector.state,
        "take": lambda: collector.take(1),
    }
    with pytest.raises(TimeoutError, match="engine 0 does not answer"):
        uses[how]()


@pytest.mark.parametrize("ahead", [False, True])
def test_a_restored_run_goes_on_as_the_one_that_was_saved(
    make: Make, ahead: bool, tmp_path: Path
) -> None:
    """Carried groups, the position, and a batch that was drawn and not yet trained on."""
    collector, engines = make()
    for step in (1, 2):
        collector.take(step)
        if ahead:
            collector.begin(step + 1)
    write_state(tmp_path, collector.state())
    state = read_state(tmp_path)
    assert state.values["carried"], "surplus live groups wait for the next step"
    assert bool(state.values["ahead"]) is ahead
    engines.version = 4
    other, other_engines = make()
    other_engines.version = 4
    other.restore(state)
    n_before = len(engines.requests)
    for step in (3, 4):
        rollout, expected = other.take(step), collector.take(step)
        assert learned_from(rollout) == learned_from(expected)
    assert other_engines.requests == engines.requests[n_before:]
