"""Whether the scorers are right, and how fast they are.

    python -m benchmarks.scoring [--per-way N] [--laid-aside] [--scorers math ...] [--source DIR]

Every pair of an answer and a truth is made from a value that is known (benchmarks/spelling), so
its label does not depend on any scorer. A third of the ways of spelling is laid aside while the
scorers are worked on; --laid-aside reports it, alone. "library" is math-verify as its authors set
it. answers/s divides by CPU seconds, on one core; math_verify and the library run in a pool of one
process with a limit of time, and their own speed is by the clock.

With --source, a folder as gpg-data takes it, the scorers also judge the reference solutions of
GSM8K's and MATH's test splits, half of them next to the wrong problem, through the pool.

The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from typing import Any

import numpy as np
import psutil

from benchmarks.spelling.tables import grade_school, mathematical
from benchmarks.spelling.ways import Pair
from gpg_megatron.config.reward import RewardConfig
from gpg_megatron.data.catalog import load_split
from gpg_megatron.reward.pool import RewardPool
from gpg_megatron.reward.scorers import SCORERS
from gpg_megatron.types import Completion, Prompt

SEED = 20261125
TIMEOUT_S = 10.0
NONE = np.zeros(0, np.int32)

Judge = Callable[[Sequence[Pair]], list[bool]]

REFERENCES = {
    "gsm8k": ("gsm8k", "answer", 40_000),
    "math": ("math", "solution", 10_000),
    "math_verify": ("math", "solution", 200),
}
"""Scorer -> data set, field with the solution, answers per second and core that are wanted."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--per-way", type=int, default=8, help="pairs for each way (default 8)")
    parser.add_argument("--laid-aside", action="store_true", help="the third that was laid aside")
    parser.add_argument("--scorers", nargs="+", default=list(JUDGES), choices=list(JUDGES))
    parser.add_argument("--show", type=int, default=0, help="wrong verdicts to show for each kind")
    parser.add_argument("--source", help="folder with the data sets; their solutions are timed")
    parser.add_argument("--answers", type=int, default=4000, help="of each scorer from --source")
    args = parser.parse_args()
    summary: dict[str, Any] = {}
    for name in args.scorers:
        source = grade_school if name == "gsm8k" else mathematical
        chosen = [p for p in source(args.per_way, SEED) if p.laid_aside == args.laid_aside]
        with ExitStack() as pools:
            summary |= report(name, JUDGES[name](pools), chosen, args.show)
    for name in REFERENCES if args.source else ():
        row = speed(name, args.source, args.answers)
        print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
        summary[f"{name}_references"] = row
    summary["answers_per_s"] = summary.get("math_answers_per_s")
    print(json.dumps(summary))


def report(name: str, judge: Judge, chosen: Sequence[Pair], shown: int) -> Mapping[str, float]:
    """Print one line for each kind; the shares and the speed over all of them."""
    by_kind: dict[str, list[Pair]] = defaultdict(list)
    for pair in chosen:
        by_kind[pair.kind].append(pair)
    missed = fooled = 0
    total = 0.0
    clock = time.process_time if name in ("math", "gsm8k") else time.perf_counter
    for kind, of_kind in by_kind.items():
        begin = clock()
        verdicts = judge(of_kind)
        seconds = clock() - begin
        total += seconds
        wrong = [p for p, right in zip(of_kind, verdicts, strict=True) if right != p.right]
        wrongly_0 = sum(p.right for p in wrong)
        missed += wrongly_0
        fooled += len(wrong) - wrongly_0
        n_right = sum(p.right for p in of_kind)
        print(
            f"{name:12} {kind:11} right {n_right:5} wrongly_0 {wrongly_0:4}  "
            f"wrong {len(of_kind) - n_right:5} wrongly_1 {len(wrong) - wrongly_0:4}  "
            f"answers/s {len(of_kind) / seconds:8.0f}",
            flush=True,
        )
        for pair in list({p.way: p for p in wrong}.values())[:shown]:
            print(f"    {'wrongly_0' if pair.right else 'wrongly_1'} {pair}")
    n_right = sum(p.right for p in chosen)
    short = {"math_verify": "verify"}.get(name, name)
    return {
        f"{short}_wrongly_0": round(missed / n_right, 4),
        f"{short}_wrongly_1": round(fooled / (len(chosen) - n_right), 4),
        f"{short}_pairs": len(chosen),
        f"{short}_answers_per_s": round(len(chosen) / total),
    }


def direct(name: str) -> Judge:
    """A scorer in this process."""
    scorer = SCORERS[name]
    return lambda chosen: [scorer(p.response, p.truth).accuracy == 1.0 for p in chosen]


def pooled(module: str, open_pools: ExitStack) -> Judge:
    """The math_verify of a module, in a process that is killed when it takes too long."""
    config = RewardConfig(scorer="math_verify", timeout_s=TIMEOUT_S)
    pool = open_pools.enter_context(closing(RewardPool(config, scorers_module=module)))
    pool.score([item("1", ["\\boxed{1}"])])  # starts up outside of the measurement

    def judge(chosen: Sequence[Pair]) -> list[bool]:
        groups = pool.score([item(p.truth, [p.response]) for p in chosen])
        return [group.rewards[0].accuracy == 1.0 for group in groups]

    return judge


JUDGES: Mapping[str, Callable[[ExitStack], Judge]] = {
    "math": lambda _: direct("math"),
    "gsm8k": lambda _: direct("gsm8k"),
    "math_verify": lambda pools: pooled("gpg_megatron.reward.scorers", pools),
    "library": lambda pools: pooled("benchmarks.spelling.library", pools),
}


def speed(scorer: str, source: str, n_answers: int) -> dict[str, Any]:
    """One row about the reference solutions."""
    name, field, goal = REFERENCES[scorer]
    rows = load_split(name, source, "test").rows
    solutions = [row["extra_info"][field] for row in rows]
    truths = [row["reward_model"]["ground_truth"] for row in rows]
    n = len(rows)
    items = [
        item(truths[i % n], [solutions[i % n], solutions[(i + 1) % n]])
        for i in range(n_answers // 2)
    ]
    with closing(RewardPool(RewardConfig(by_source={"-": scorer}))) as pool:
        pool.score(items[:8])  # starts up outside of the measurement
        (worker,) = psutil.Process().children()
        before, begin = _cpu_seconds(worker), time.perf_counter()
        groups = pool.score(items)
        cpu, seconds = _cpu_seconds(worker) - before, time.perf_counter() - begin
    rewards = [reward for group in groups for reward in group.rewards]
    return {
        "scorer": scorer,
        "answers": len(rewards),
        "right": sum(reward.accuracy for reward in rewards),
        "unjudged": sum(bool({"timeout", "memory", "crash"} & r.parts.keys()) for r in rewards),
        "per_core": round(len(rewards) / cpu),
        "per_second": round(len(rewards) / seconds),
        "goal": goal,
    }


def item(truth: str, responses: Sequence[str]) -> tuple[Prompt, list[Completion]]:
    """A problem and the answers to it, as the pool takes them."""
    prompt = Prompt(id="-", token_ids=NONE, messages=(), ground_truth=truth, data_source="-")
    return prompt, [
        Completion(
            prompt_id="-",
            index=i,
            token_ids=NONE,
            logprobs=np.zeros(0, np.float32),
            finish_reason="stop",
            text=text,
            versions=(),
        )
        for i, text in enumerate(responses)
    ]


def _cpu_seconds(worker: psutil.Process) -> float:
    times = worker.cpu_times()
    return time.process_time() + float(times.user) + float(times.system)


if __name__ == "__main__":
    main()
