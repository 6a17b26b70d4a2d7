"""What stands around the run's own code in benchmarks.host: a clock, turns, engines, scorers."""

from __future__ import annotations

import pickle
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch.distributed as dist

from gpg_megatron.config.sections import Config
from gpg_megatron.data.stream import PromptStream
from gpg_megatron.host.collectives import broadcast, on_rank0
from gpg_megatron.loop.rollouts import Collector, Rollout
from gpg_megatron.observe.watchdog import Watchdog
from gpg_megatron.rollout.sampling import Sampled, SamplingRequest, to_completions
from gpg_megatron.types import Completion, Prompt, Reward, ScoredGroup

PROMPT_TOKENS = 128
ANSWERS = 8
AT_ONCE = 64
"""Groups that the stand-in makes in a row: reading the CPU's clock can cost a millisecond."""


class Clock:
    """CPU seconds of this process, each counted in the innermost part that is open."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._open, self._begin = "between", time.process_time()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """The body's seconds are of this part, those of parts within it aside."""
        outer = self._change(name)
        yield
        self._change(outer)

    def _change(self, name: str) -> str:
        now, before = time.process_time(), self._open
        self.seconds[before] += now - self._begin
        self._open, self._begin = name, now
        return before


class Link:
    """The run's collectives. A rank has the turn but for them: no two compute at once."""

    def __init__(self, clock: Clock, turn: Any) -> None:
        self._clock = clock
        self._turn = turn
        self.broadcast_s = 0.0
        """By the clock."""

    def on_rank0(self, action: Callable[[], Any]) -> Any:
        def in_turn() -> Any:
            with self._turn:
                return action()

        with self.others():
            return on_rank0(in_turn)

    def broadcast(self, array: Any) -> None:
        with self.others():
            dist.barrier()
            begin = time.perf_counter()
            with self._clock.part("broadcast"):
                broadcast(array)
            self.broadcast_s += time.perf_counter() - begin

    @contextmanager
    def others(self) -> Iterator[None]:
        """The turn is theirs."""
        self._turn.release()
        yield
        self._turn.acquire()


class Engines:
    """Random answers, in the form in which Ray hands them over: views of its store."""

    def __init__(self, clock: Clock, mean_tokens: int) -> None:
        self._clock = clock
        self._mean = mean_tokens
        self._rng = np.random.default_rng(3)

    def generate(self, requests: Sequence[SamplingRequest]) -> list[Completion]:
        found = []
        for first in range(0, len(requests), AT_ONCE):
            part = requests[first : first + AT_ONCE]
            with self._clock.part("engines"):
                sent = [self._answer(request.params.n) for request in part]
            for request, (answer, buffers) in zip(part, sent, strict=True):
                found += to_completions(request, pickle.loads(answer, buffers=buffers))
        return found

    def _answer(self, n: int) -> tuple[bytes, list[pickle.PickleBuffer]]:
        lengths = self._rng.integers(1, 2 * self._mean, n).tolist()
        sampled = Sampled(
            lengths=tuple(lengths),
            token_ids=self._rng.integers(0, 150_000, sum(lengths), np.int32),
            logprobs=-self._rng.random(sum(lengths), np.float32),
            finish_reasons=("stop",) * n,
            texts=tuple("word" * length for length in lengths),
            versions=tuple((("0", 0, length),) for length in lengths),
        )
        buffers: list[pickle.PickleBuffer] = []
        return pickle.dumps(sampled, protocol=5, buffer_callback=buffers.append), buffers


class Scorers:
    """Right or wrong by chance: nearly every group is live."""

    def __init__(self) -> None:
        self._rng = np.random.default_rng(4)

    def score(self, pairs: Sequence[tuple[Prompt, Sequence[Completion]]]) -> list[ScoredGroup]:
        return [
            ScoredGroup(
                prompt=prompt,
                completions=tuple(completions),
                rewards=tuple(map(_reward, self._rng.integers(0, 2, len(completions)).tolist())),
            )
            for prompt, completions in pairs
        ]


def _reward(right: int) -> Reward:
    score = float(right)
    return Reward(score=score, accuracy=score, parts={"exact_match": score}, answer="7")


class Taken:
    """A collector whose seconds are those of a part."""

    def __init__(self, collector: Collector, clock: Clock) -> None:
        self._collector = collector
        self._clock = clock

    def take(self, step: int) -> Rollout:
        with self._clock.part("take"):
            return self._collector.take(step)


def collector_of(config: Config, clock: Clock, watchdog: Watchdog) -> Any:
    """The run's own between stand-ins."""
    engines: Any = Engines(clock, config.rollout.max_response_length // 2)
    scorers: Any = Scorers()
    prompts = [
        Prompt(
            id=f"random/{i}",
            token_ids=np.full(PROMPT_TOKENS, i, np.int32),
            messages=({"role": "user", "content": "word" * PROMPT_TOKENS},),
            ground_truth="7",
            data_source="random",
        )
        for i in range(config.trainer.train_batch_size)
    ]
    stream = PromptStream(prompts, seed=0, shuffle=False)
    return Taken(Collector(config, stream, engines, scorers, watchdog), clock)
