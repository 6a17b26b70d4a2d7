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
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import closing
from multiprocessing import get_context
from pathlib import Path
from statistics import linear_regression
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from benchmarks.host_parts import ANSWERS, Clock, Link, collector_of
from benchmarks.machine import machine
from gpg_megatron.algorithm.advantages import assign_advantages
from gpg_megatron.batching.updates import BatchPlan, make_batches
from gpg_megatron.config.sections import Config, RolloutConfig, TrainerConfig
from gpg_megatron.loop.rollouts import Rollouts
from gpg_megatron.model.flops import TokenCosts
from gpg_megatron.observe.watchdog import Watchdog

MAX_TOKENS = 32768
"""Of a micro-batch."""
COSTS = TokenCosts(per_token=4e10, per_loss_token=3e9, per_pair=1e6)
"""About those of a model of seven billion parameters."""
RAW = 8
"""Bytes of a token: its id and its log-prob."""
PARTS = ("take", "share", "broadcast", "advantages", "plan", "pack")
COLUMNS = (*PARTS, "total", "by clock", "copy", "bytes")
PARALLEL = get_context("fork")


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
