"""How many answers the scorers judge, through the pool of processes, on one core.

    python -m benchmarks.reward --source DIR [--answers N]

DIR is a folder as gpg-data takes it. Half of the answers are the reference solutions of GSM8K's and
MATH's test splits, half are those of another problem, so that the symbolic comparison of
math-verify has work: equal spellings are decided without it. per_core divides by the CPU seconds
of this process and of the one scoring process together, per_second by the time on the clock.

The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from contextlib import closing
from typing import Any

import psutil

from gpg_megatron.config.sections import RewardConfig, Scorer
from gpg_megatron.data.catalog import load_split
from gpg_megatron.reward.pool import RewardPool
from gpg_megatron.types import Completion, Prompt

CASES: dict[Scorer, tuple[str, str, int]] = {
    "gsm8k": ("gsm8k", "answer", 2000),
    "math": ("math", "solution", 2000),
    "math_verify": ("math", "solution", 200),
}
"""Scorer -> data set, field with the solution, answers per second and core that are wanted."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", required=True)
    parser.add_argument("--answers", type=int, default=4000, help="of each scorer (default 4000)")
    args = parser.parse_args()
    rows = [measure(scorer, args.source, args.answers) for scorer in CASES]
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items()))
    print(json.dumps(rows))


def measure(scorer: Scorer, source: str, n_answers: int) -> dict[str, Any]:
    """One row of the table."""
    name, field, goal = CASES[scorer]
    rows = load_split(name, source, "test").rows
    solutions = [row["extra_info"][field] for row in rows]
    truths = [row["reward_model"]["ground_truth"] for row in rows]
    n = len(rows)
    items = [
        _item(truths[i % n], [solutions[i % n], solutions[(i + 1) % n]], name)
        for i in range(n_answers // 2)
    ]
    with closing(RewardPool(RewardConfig(scorer=scorer))) as pool:
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


def _item(truth: str, responses: list[str], source: str) -> tuple[Prompt, list[Completion]]:
    prompt = Prompt(id="-", token_ids=(0,), messages=(), ground_truth=truth, data_source=source)
    return prompt, [
        Completion(
            prompt_id="-",
            index=i,
            token_ids=(),
            logprobs=(),
            finish_reason="stop",
            text=text,
            versions=(),
        )
        for i, text in enumerate(responses)
    ]


def _cpu_seconds(worker: psutil.Process) -> float:
    times = worker.cpu_times()
    return float(time.process_time() + times.user + times.system)


if __name__ == "__main__":
    main()
