"""What the host does for a step between engines and policy: seconds and bytes of every rank.

    python -m benchmarks.host [--tokens 1.5e6 8.4e6 64e6] [--ranks 8] [--response-tokens 2048]

The run's own parts (loop/rollouts.py, algorithm/, batching/) in as many processes as there are
data-parallel ranks, over gloo. Engines and scorers are stand-ins, and what these spend is not
counted: answers come as Ray hands them over, and a reward is drawn. No policy follows.

    take        answers -> scored groups; rank 0 only
    share       groups <-> flat arrays and their description
    broadcast   of the arrays; also by the clock, all ranks at once
    advantages  groups -> samples
    plan        samples -> micro-batches, not yet packed
    pack        this rank's micro-batches, one after the other
    copy        of the raw bytes, 8 for each token, to compare with

Seconds are CPU seconds of one rank; ranks take turns, so that none slows another. Bytes are those
of resident memory at its peak, above what was there before the step, for each response token and
beyond the raw 8. The exponent is the slope of log seconds over log tokens. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import pickle
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from multiprocessing import get_context
from pathlib import Path
from statistics import linear_regression
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.machine import machine
from gpg_megatron.algorithm.advantages import assign_advantages
from gpg_megatron.batching.updates import BatchPlan, make_batches
from gpg_megatron.config.sections import Config, RolloutConfig, TrainerConfig
from gpg_megatron.data.stream import PromptStream
from gpg_megatron.host.collectives import broadcast, on_rank0
from gpg_megatron.loop.rollouts import Collector, Rollout, Rollouts
from gpg_megatron.model.flops import TokenCosts
from gpg_megatron.observe.watchdog import Watchdog
from gpg_megatron.rollout.sampling import Sampled, SamplingRequest, to_completions
from gpg_megatron.types import Completion, Prompt, Reward, ScoredGroup

PROMPT_TOKENS = 128
ANSWERS = 8
MAX_TOKENS = 32768
"""Of a micro-batch."""
AT_ONCE = 64
"""Groups that the stand-in makes in a row: reading the CPU's clock can cost a millisecond."""
COSTS = TokenCosts(per_token=4e10, per_loss_token=3e9, per_pair=1e6)
"""About those of a model of seven billion parameters."""
RAW = 8
"""Bytes of a token: its id and its log-prob."""
PARTS = ("take", "share", "broadcast", "advantages", "plan", "pack")
COLUMNS = (*PARTS, "total", "by clock", "copy", "bytes")
PARALLEL = get_context("fork")


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


class Case(NamedTuple):
    """One size."""

    tokens: float
    """Of all answers, about."""
    response_tokens: int
    """The mean."""
    n_ranks: int

    @property
    def n_groups(self) -> int:
        return max(1, round(self.tokens / ANSWERS / self.response_tokens))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host", description=__doc__)
    parser.add_argument("--tokens", type=float, nargs="+", default=[1.5e6, 8.4e6, 64e6])
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--response-tokens", type=int, default=2048, help="their mean")
    args = parser.parse_args()
    print(f"{machine()}; {args.ranks} ranks, answers of {args.response_tokens} tokens on average")
    print(f"| tokens | rank | {' | '.join(COLUMNS)} |\n{'|---' * (len(COLUMNS) + 2)}|")
    found = {}
    for tokens in sorted(args.tokens):
        case = Case(tokens, args.response_tokens, args.ranks)
        found[case] = measure(case)
        print("\n".join(rows(found[case])), flush=True)
    print(json.dumps(verdict(found)))


def measure(case: Case) -> list[Mapping[str, float]]:
    """What each rank found."""
    with tempfile.TemporaryDirectory() as folder:
        turn, results = PARALLEL.Lock(), PARALLEL.SimpleQueue()
        processes = [
            PARALLEL.Process(target=one_rank, args=(rank, case, folder, turn, results))
            for rank in range(case.n_ranks)
        ]
        for process in processes:
            process.start()
        found = dict(results.get() for _ in processes)
        for process in processes:
            process.join()
    return [found[rank] for rank in range(case.n_ranks)]


def one_rank(rank: int, case: Case, folder: str, turn: Any, results: Any) -> None:
    """A small step that warms up, and the step that is measured."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=case.n_ranks)
    step(turn, rank, case._replace(tokens=2 * case.n_ranks * ANSWERS * case.response_tokens))
    dist.barrier()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    results.put((rank, step(turn, rank, case, before)))
    dist.barrier()
    dist.destroy_process_group()


def step(turn: Any, rank: int, case: Case, before: int = 0) -> Mapping[str, float]:
    """One rank's host work for a rollout batch; its seconds by part, and its bytes.

    Args:
        before: bytes of resident memory.
    """
    config = Config(
        rollout=RolloutConfig(n=ANSWERS, max_response_length=2 * case.response_tokens),
        trainer=TrainerConfig(train_batch_size=case.n_groups),
    )
    clock = Clock()
    link = Link(clock, turn)
    with turn, closing(Watchdog(rank=rank, limit_s=3600)) as watchdog:
        collector = collector_of(config, clock, watchdog) if rank == 0 else None
        rollouts = Rollouts(collector, link.on_rank0, link.broadcast, watchdog, last_ahead=0)
        with clock.part("share"):
            rollout = rollouts.take(1)
        with clock.part("advantages"):
            samples, _ = assign_advantages(rollout.groups, config.algorithm)
        plan = BatchPlan(
            algorithm=config.algorithm,
            n_updates=1,
            max_tokens=MAX_TOKENS,
            max_response_length=config.rollout.max_response_length,
            dp_rank=rank,
            dp_size=case.n_ranks,
            costs=COSTS,
            share_prompts=True,
        )
        with clock.part("plan"):
            batches = make_batches(samples, plan)
        with clock.part("pack"):
            for batch in batches:
                for _ in batch.micro_batches:
                    pass
        extra = resident("VmHWM") - before
        with clock.part("copy"):
            for sample in samples:
                sample.response_token_ids.copy(), sample.rollout_logprobs.copy()
        with clock.part("between"):
            n_tokens = sum(len(sample.response_token_ids) for sample in samples)
    seconds = {name: clock.seconds[name] for name in (*PARTS, "copy")}
    return seconds | {
        "total": sum(seconds[name] for name in PARTS),
        "by clock": link.broadcast_s,
        "bytes": extra / n_tokens - RAW,
        "tokens": n_tokens,
    }


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


def resident(name: str) -> int:
    """Bytes, from a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024


def slowest(ranks: Sequence[Mapping[str, float]]) -> Mapping[str, float]:
    """The rank with most seconds in all."""
    return max(ranks, key=lambda rank: rank["total"])


def rows(ranks: Sequence[Mapping[str, float]]) -> list[str]:
    """Of rank 0, and of the slowest of the others."""
    return [
        f"| {rank['tokens'] / 1e6:.1f} M | {name} | "
        + " | ".join(f"{rank[c]:.{1 if c == 'bytes' else 2}f}" for c in COLUMNS)
        + " |"
        for name, rank in (("0", ranks[0]), ("other", slowest(ranks[1:])))
    ]


def verdict(found: Mapping[Case, Sequence[Mapping[str, float]]]) -> dict[str, float]:
    """The last line: of each size its slowest rank, of the largest the most bytes."""
    worst = {case: slowest(ranks) for case, ranks in found.items()}
    line = {f"seconds_{c.tokens / 1e6:.0f}m": round(r["total"], 2) for c, r in worst.items()}
    line["bytes_per_token"] = round(max(rank["bytes"] for rank in found[max(found)]), 1)
    if len(found) > 1:
        logs = [[math.log(r[name]) for r in worst.values()] for name in ("tokens", "total")]
        line["exponent"] = round(linear_regression(*logs).slope, 3)
    return line


if __name__ == "__main__":
    main()
