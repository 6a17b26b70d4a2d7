"""The driver of the state machine; engines and scorers are stand-ins that can be held and made to
fail at will."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpg_megatron.config.algorithm import AlgorithmConfig
from gpg_megatron.config.sections import Config, RolloutConfig, TrainerConfig
from gpg_megatron.data.stream import PromptStream
from gpg_megatron.loop.collector import Collector, Rollout, rules_of
from gpg_megatron.loop.rollouts import Rollouts
from gpg_megatron.loop.state import read_state, write_state
from gpg_megatron.observe.watchdog import Watchdog
from gpg_megatron.rollout.sampling import SamplingRequest
from gpg_megatron.types import Completion, Prompt, Reward, ScoredGroup, VersionSpan
from tests.samples import float32, int32, plain

PROMPTS = [
    Prompt(id=f"toy/{i}", token_ids=int32((1, 2)), messages=(), ground_truth="", data_source="toy")
    for i in range(10)
]
BY_ID = {prompt.id: prompt for prompt in PROMPTS}


class Engines:
    """Answers in the order asked, with the version that it has, unless it is held."""

    def __init__(self) -> None:
        self.version = 0
        self.requests: list[tuple[str, int]] = []
        self.held_from = 10**9
        """The first ticket that is answered only when it may go."""
        self.may_go = threading.Event()
        self.failure: Exception | None = None
        self.stopped: list[tuple[int, bool]] = []
        self.lost: set[int] = set()
        """What is begun and never answered: engines are lost, and then have other weights."""
        self._flying: dict[int, list[Completion]] = {}

    def __len__(self) -> int:
        return len(self._flying)

    def start(self, key: int, request: SamplingRequest) -> None:
        assert key not in self._flying
        self.requests.append((request.prompt.id, request.params.seed))
        self._flying[key] = [
            Completion(
                prompt_id=request.prompt.id,
                index=index,
                token_ids=int32((request.params.seed % 97,)),
                logprobs=float32((-0.5,)),
                finish_reason="stop",
                text="a word",
                versions=(VersionSpan(version=self.version, start=0, end=1),),
            )
            for index in range(request.params.n)
        ]

    def stop(self, key: int, *, keep: bool) -> None:
        """What is kept is an answer like the others; from then on nothing is held."""
        self.stopped.append((key, keep))
        if not keep:
            del self._flying[key]
        self.held_from = 10**9
        self.may_go.set()

    def next(self) -> list[tuple[int, list[Completion] | None]]:
        if not self._flying:
            return []
        key = next(iter(self._flying))
        if key in self.lost:
            del self._flying[key]
            return [(key, None)]
        if key >= self.held_from:
            assert self.may_go.wait(20), "held for 20 s"
            if self.failure:
                raise self.failure
        return [(key, self._flying.pop(key))] if key in self._flying else []


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


def config(
    staleness: int = 0, update: Any = "drain", beta_th: float = 1.0, **rollout: Any
) -> Config:
    return Config(
        rollout=RolloutConfig(n=2, update=update, **rollout),
        trainer=TrainerConfig(train_batch_size=4, seed=5, max_staleness=staleness),
        algorithm=AlgorithmConfig(beta_th=beta_th, max_redraws=3),
    )


def learned_from(rollout: Rollout) -> Any:
    """Everything but the seconds, and how far ahead the engines were."""
    metrics = {k: v for k, v in rollout.metrics.items() if not k.startswith("stream/")}
    return plain(replace(rollout, timings={}, metrics=metrics))


Make = Callable[[Config], tuple[Collector, Engines]]


@pytest.fixture
def make() -> Iterator[Make]:
    watchdog = Watchdog(rank=0, limit_s=60)

    def build(config: Config) -> tuple[Collector, Engines]:
        engines: Any = Engines()
        scorers: Any = Scorers()
        stream = PromptStream(PROMPTS, seed=5, shuffle=True)
        rules = rules_of(config, room=64)
        return Collector(config, rules, stream, engines, scorers, watchdog), engines

    yield build
    watchdog.close()


def step(collector: Collector, engines: Engines) -> Rollout:
    """Take a batch, learn from it, publish."""
    rollout = collector.take()
    collector.begin_publish()
    engines.version += 1
    collector.end_publish()
    return rollout


def test_the_batches_ahead_are_those_that_are_drawn_in_turn(make: Make) -> None:
    """One ahead is today's lockstep: the same prompts, seeds, redraws and surplus."""
    in_turn, there = make(config(0))
    ahead, here = make(config(1))
    for _ in range(5):
        rollout, expected = step(ahead, here), step(in_turn, there)
        same = [plain(g.rewards) for g in rollout.groups]
        assert same == [plain(g.rewards) for g in expected.groups]
        assert [g.prompt.id for g in rollout.groups] == [g.prompt.id for g in expected.groups]
        assert rollout.metrics.items() >= expected.metrics.items()
        assert set(expected.timings) == {"timing/rollout_s", "timing/reward_s"}
    n = len(there.requests)
    assert here.requests[:n] == there.requests


@pytest.mark.parametrize("update", ["drain", "in-flight"])
@pytest.mark.parametrize("staleness", [1, 2, 4])
def test_no_group_is_older_than_may_be(make: Make, staleness: int, update: Any) -> None:
    collector, engines = make(config(staleness, update))
    for learned in range(8):
        rollout = step(collector, engines)
        ages = {learned - c.versions[0].version for g in rollout.groups for c in g.completions}
        assert max(ages) <= max(staleness, 2), "a surplus of redraws is one batch older"
        assert learned < 4 or max(ages) > 0


def test_groups_are_drawn_while_the_caller_does_something_else(make: Make) -> None:
    collector, engines = make(config(1, beta_th=0.0))
    engines.held_from = 4
    collector.take()
    assert len(engines) == 4, "the next batch is in flight"
    engines.may_go.set()
    collector.begin_publish()
    assert len(engines) == 0
    engines.version = 7  # does not reach what was drawn
    collector.end_publish()
    spans = [c.versions for group in collector.take().groups for c in group.completions]
    assert {span.version for (span,) in spans} == {0}


@pytest.mark.parametrize("update", ["drain", "in-flight"])
def test_an_evaluation_that_wants_to_be_alone_is(make: Make, update: Any) -> None:
    collector, engines = make(config(2, update, beta_th=0.0))
    none: Any = None
    beside, alone = (
        Rollouts(collector, none, none, none, ahead=True, stops=stops) for stops in (False, True)
    )
    for _ in range(3):
        step(collector, engines)
        state = collector.state().values["machine"]
        with beside.evaluating():
            pass
        with alone.evaluating():
            assert len(engines) == 0
        assert collector.state().values["machine"]["weights"] == state["weights"]
    assert len(collector.take().groups) == 4


def test_other_ranks_get_what_is_learned_from_and_arrays_are_not_pickled(make: Make) -> None:
    collector, _ = make(config())
    sent: list[bytes] = []
    arrays: list[Any] = []

    def ask(action: Callable[[], Any]) -> Any:
        answer = action()
        sent.append(pickle.dumps(answer))
        return answer

    none: Any = None
    mine = Rollouts(collector, ask, arrays.append, none, ahead=False).take()
    assert len(sent) == 1 and b"numpy" not in sent[0]
    other = Rollouts(
        None,
        lambda _: pickle.loads(sent[0]),
        lambda array: np.copyto(array, arrays.pop(0)),
        none,
        ahead=False,
    )
    bare = tuple(
        replace(group, completions=tuple(replace(c, text="") for c in group.completions))
        for group in mine.groups
    )
    assert {c.text for group in mine.groups for c in group.completions} == {"a word"}
    assert plain(other.take()) == plain(replace(mine, groups=bare)) and not arrays


@pytest.mark.parametrize("how", ["publish", "take", "state"])
def test_what_fails_in_the_thread_is_raised_where_it_is_used(make: Make, how: str) -> None:
    collector, engines = make(config(1, beta_th=0.0))
    engines.held_from = 4
    collector.take()
    engines.failure = TimeoutError("engine 0 does not answer")
    engines.may_go.set()
    uses: dict[str, Callable[[], object]] = {
        "publish": collector.begin_publish,
        "take": collector.take,
        "state": collector.state,
    }
    with pytest.raises(TimeoutError, match="engine 0 does not answer"):
        while True:
            uses[how]()


@pytest.mark.parametrize("staleness", [0, 1])
def test_a_restored_run_goes_on_as_the_one_that_was_saved(
    make: Make, staleness: int, tmp_path: Path
) -> None:
    """Surplus groups, the position, and a batch that was drawn and not yet trained on."""
    collector, engines = make(config(staleness))
    for _ in range(2):
        step(collector, engines)
    write_state(tmp_path, collector.state())
    state = read_state(tmp_path, 2)
    assert len(state.groups) >= 4 if staleness else 0 < len(state.groups) < 4
    other, other_engines = make(config(staleness))
    other_engines.version = engines.version
    other.restore(state, BY_ID)
    n_before = len(engines.requests)
    for _ in range(2):
        assert learned_from(step(other, other_engines)) == learned_from(step(collector, engines))
    assert other_engines.requests == engines.requests[n_before:]


@pytest.mark.parametrize(("staleness", "update"), [(0, "drain"), (2, "in-flight")])
def test_what_a_lost_engine_had_is_drawn_again_with_other_seeds(
    make: Make, staleness: int, update: Any
) -> None:
    drawn = []
    for lost in (set[int](), {1, 2, 6}):
        collector, engines = make(config(staleness, update, beta_th=0.0))
        engines.lost = lost
        drawn.append([g.prompt.id for _ in range(3) for g in step(collector, engines).groups])
        assert len({seed for _, seed in engines.requests}) == len(engines.requests)
    assert drawn[0] == drawn[1], "nothing is lost, nothing is there twice"


def test_what_is_aborted_is_drawn_again_first_and_with_other_seeds(make: Make) -> None:
    collector, engines = make(config(beta_th=0.0, oversample=0.5, unfinished="abort"))
    engines.held_from = 4
    assert len(step(collector, engines).groups) == 4
    assert engines.stopped == [(4, False), (5, False)]
    late = engines.requests[4:6]
    rollout = step(collector, engines)
    again = engines.requests[6:8]
    assert [name for name, _ in again] == [name for name, _ in late]
    assert {seed for _, seed in again}.isdisjoint({seed for _, seed in late})
    assert [group.prompt.id for group in rollout.groups[:2]] == [name for name, _ in late]


def test_what_is_cut_belongs_to_the_batch(make: Make) -> None:
    collector, engines = make(config(beta_th=0.0, oversample=0.5, unfinished="cut"))
    engines.held_from = 2
    groups = step(collector, engines).groups
    assert [g.prompt.id for g in groups] == [name for name, _ in engines.requests[:4]]
    assert (2, True) in engines.stopped and (3, True) in engines.stopped


def test_what_was_in_flight_is_drawn_again(make: Make, tmp_path: Path) -> None:
    collector, engines = make(config(2, "in-flight", beta_th=0.0))
    engines.held_from = 6
    step(collector, engines)
    write_state(tmp_path, collector.state())
    state = read_state(tmp_path, 1)
    flying = {int(ticket) for ticket, _ in state.values["machine"]["flying"]}
    assert flying >= {6, 7} and {int(t) for t in state.values["prompts"]} == flying
    other, other_engines = make(config(2, "in-flight", beta_th=0.0))
    other.restore(state, BY_ID)
    for _ in range(4):
        step(other, other_engines)
    again = [name for name, _ in other_engines.requests[: len(flying)]]
    assert sorted(again) == sorted(state.values["prompts"].values()), "first, and each once"
