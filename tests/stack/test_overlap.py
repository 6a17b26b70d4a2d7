"""Where each side has hardware of its own: everything between engines and policy is real, the two
only wait as long as they would work."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from itertools import cycle
from pathlib import Path
from typing import Any, Literal

import pytest

from gpg_megatron.config.reward import RewardConfig
from gpg_megatron.config.sections import Config, RolloutConfig, TrainerConfig
from gpg_megatron.data.stream import PromptStream
from gpg_megatron.loop.collector import Collector, rules_of
from gpg_megatron.observe.watchdog import Watchdog
from gpg_megatron.reward.pool import RewardPool
from gpg_megatron.rollout.calls import PendingCalls
from gpg_megatron.rollout.flights import Flights
from gpg_megatron.rollout.sampling import Sampled, SamplingRequest
from gpg_megatron.types import Prompt
from tests.samples import float32, int32

SIZE, N_ENGINES, GROUPS_EACH, N = 16, 2, 8, 4
SECONDS = (0.6, 0.8, 1.0, 1.2, 1.4, 1.6, 2.0, 5.8)
"""That an engine works on a group; it can do GROUPS_EACH at once. 1.8 in the mean."""
POLICY_S, PUBLISH_S = 1.9, 0.1
N_STEPS, N_WARM_UP = 7, 3


class Engine:
    """An actor that waits."""

    def __init__(self, seed: int) -> None:
        self._seconds = cycle(SECONDS[seed:] + SECONDS[:seed])

    async def ready(self) -> None:
        """The process is there."""

    async def answer(self, request: SamplingRequest) -> Sampled:
        """The same answer a few times."""
        import asyncio

        await asyncio.sleep(next(self._seconds))
        n = request.params.n
        return Sampled(
            lengths=(1000,) * n,
            token_ids=int32(range(1000 * n)),
            logprobs=float32([-1.0] * 1000 * n),
            finish_reasons=("stop",) * n,
            texts=("#### 1",) * n,
            versions=((("0", 0, 1000),),) * n,
        )


class Fleet:
    """See flights.Engines."""

    version = 0

    def __init__(self, actors: list[Any]) -> None:
        self._actors = actors

    def ready(self) -> range:
        return range(N_ENGINES)

    def ask(self, engine: int, request: SamplingRequest, name: str) -> Any:
        return self._actors[engine].answer.remote(request)

    def stop(self, engine: int, name: str) -> None:
        raise NotImplementedError

    def generating(self, sent: Mapping[Any, int]) -> PendingCalls:
        return PendingCalls("waiting", [Path("none")] * N_ENGINES, sent)


@pytest.fixture(scope="module")
def actors(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Any]]:
    import ray

    ray.init(
        num_cpus=N_ENGINES,
        include_dashboard=False,
        object_store_memory=100 * 2**20,
        logging_level=logging.ERROR,
    )
    actor_class: Any = ray.remote(num_cpus=1)(Engine)
    engines = [actor_class.remote(3 * i) for i in range(N_ENGINES)]
    ray.get([engine.ready.remote() for engine in engines], timeout=300)
    yield engines
    ray.shutdown()


def step_seconds(
    actors: list[Any], staleness: int, update: Literal["drain", "in-flight"]
) -> list[float]:
    """Of each step."""
    config = Config(
        rollout=RolloutConfig(n=N, update=update),
        reward=RewardConfig(scorer="gsm8k"),
        trainer=TrainerConfig(
            train_batch_size=SIZE, max_staleness=staleness, total_training_steps=N_STEPS
        ),
    )
    prompts = [
        Prompt(
            id=str(i), token_ids=int32((1, 2)), messages=(), ground_truth="1", data_source="gsm8k"
        )
        for i in range(100)
    ]
    flights = Flights(Fleet(actors), timeout_s=60)
    rules = rules_of(config, room=N_ENGINES * GROUPS_EACH * N)
    seconds = []
    with closing(RewardPool(config.reward)) as pool, closing(Watchdog(rank=0, limit_s=60)) as dog:
        collector = Collector(config, rules, PromptStream(prompts, 1, True), flights, pool, dog)
        for _ in range(N_STEPS):
            began = time.monotonic()
            assert len(collector.take().groups) == SIZE
            time.sleep(POLICY_S)
            collector.begin_publish()
            time.sleep(PUBLISH_S)
            collector.end_publish()
            seconds.append(time.monotonic() - began)
    return seconds


@pytest.mark.slow
def test_the_slower_of_the_two_phases_is_what_a_step_takes(actors: list[Any]) -> None:
    """At least 0.9 of it; in turn it is less than half."""
    rollout = SIZE * sum(SECONDS) / len(SECONDS) / (N_ENGINES * GROUPS_EACH)
    bound = max(rollout, POLICY_S + PUBLISH_S)
    shares = {}
    for staleness, update in ((0, "drain"), (1, "drain"), (2, "in-flight"), (4, "in-flight")):
        seconds = step_seconds(actors, staleness, update)[N_WARM_UP:]  # type: ignore[arg-type]
        shares[staleness] = bound * len(seconds) / sum(seconds)
        print(f"K = {staleness}, {update}: {shares[staleness]:.2f} of the bound {bound:.2f} s")
    assert shares[0] < 0.5 and shares[4] >= 0.9
