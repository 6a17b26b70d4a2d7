"""The work that gpg-train, TRL and vLLM do in benchmarks.peer: prompts, and a score that makes as
many groups dead as wanted. Needs no package, so that each reads it in its own environment.
"""

from __future__ import annotations

import random
import zlib

LIVE, DEAD = "live", "dead"


def rows(n_prompts: int, dead: float) -> list[tuple[str, str]]:
    """(prompt, LIVE or DEAD); the first round(dead * n_prompts) are dead."""
    rng = random.Random(0)
    n_dead = round(dead * n_prompts)
    return [(_prompt(rng), DEAD if i < n_dead else LIVE) for i in range(n_prompts)]


def score(response: str, kind: str) -> float:
    """0 where the group is to be dead; else a coin that the text itself throws, so that eight equal
    scores come once in 128 groups."""
    return float(kind == LIVE and zlib.crc32(response.encode()) % 2)


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: object
) -> float:
    """As reward.custom_function."""
    return score(solution_str, ground_truth)


def _prompt(rng: random.Random) -> str:
    a, b, c = (rng.randint(10, 99) for _ in range(3))
    return f"max(31, 94, 57) = 94\nmax({a}, {b}, {c}) = "
