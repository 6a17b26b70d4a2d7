"""What n scored answers to each problem say about a model. Pure functions.

Legend: N problems; n answers to each, c of them right; k of the n.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, variance

MAJORITY_DRAWS = 200
"""Subsets of k answers over which maj@k is averaged when k < n."""
Z95 = 1.959964
"""Of the normal distribution, two-sided."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A mean over problems with its uncertainty."""

    value: float
    low: float
    """End of the 95 % confidence interval, at least 0."""
    high: float
    """End of it, at most 1."""
    half_width: float | None
    """Half the length of the interval; None for a single problem, which has none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """The answers to one problem."""

    accuracy_n: tuple[float, ...]
    """[n] 1.0 right, 0.0 wrong."""
    answer_n: tuple[str | None, ...]
    """[n] what was read as the answer; None does not vote."""


def estimate(values_N: Sequence[float]) -> Estimate:
    """Mean over problems, and Wilson's interval for it (Wilson 1927, JASA 22).

    The problems are taken as a sample of all problems of their kind, so that the n answers to
    one problem count once, by their mean (Miller 2024, arXiv 2411.00640, section 2). Means that
    differ less than single answers would tell as much as more problems with one answer each:
    p (1 - p) over the squared standard error of the mean is their number.

    Args:
        values_N: within [0, 1].
    """
    n, p = len(values_N), fmean(values_N)
    if n == 1:
        return Estimate(value=p, low=p, high=p, half_width=None)
    spread = variance(values_N)
    # With one answer to each problem this is n - 1: the spread is estimated.
    effective = max(n - 1, n * p * (1 - p) / spread) if spread else n - 1
    low, high = wilson(p, effective)
    return Estimate(value=p, low=low, high=high, half_width=(high - low) / 2)


def wilson(p: float, n: float) -> tuple[float, float]:
    """The 95 % confidence interval of a share p that was seen in n trials."""
    z2 = Z95 * Z95 / n
    middle = (p + z2 / 2) / (1 + z2)
    half = math.sqrt(z2 * (p * (1 - p) + z2 / 4)) / (1 + z2)
    # At p = 0 and p = 1 the ends are 0 and 1 exactly, but for rounding.
    return max(0.0, min(p, middle - half)), min(1.0, max(p, middle + half))


def pass_at_k(n: int, c: int, k: int) -> float:
    """Probability that k of n answers, drawn without replacement, hold a right one:
    1 - C(n-c, k) / C(n, k), unbiased (Chen et al. 2021, arXiv 2107.03374, equation 1)."""
    assert 0 <= c <= n and 1 <= k <= n, (n, c, k)
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def majority(answers: Answers) -> float:
    """Whether the most frequent answer is right (Wang et al. 2022, arXiv 2203.11171).

    Of equally frequent ones each is taken with the same probability. Without any answer 0.
    """
    votes = Counter(answer for answer in answers.answer_n if answer is not None)
    if not votes:
        return 0.0
    most = max(votes.values())
    right = []
    for answer in (answer for answer, count in votes.items() if count == most):
        pairs = zip(answers.answer_n, answers.accuracy_n, strict=True)
        right.append(fmean(accuracy for given, accuracy in pairs if given == answer))
    return fmean(right)


def majority_at_k(answers: Answers, k: int, seed: int) -> float:
    """Mean of `majority` over subsets of k answers: all n when k = n, else MAJORITY_DRAWS."""
    n = len(answers.accuracy_n)
    if k == n:
        return majority(answers)
    rng = random.Random(f"{seed}/{k}")
    draws = (rng.sample(range(n), k) for _ in range(MAJORITY_DRAWS))
    return fmean(
        majority(
            Answers(
                accuracy_n=tuple(answers.accuracy_n[i] for i in draw),
                answer_n=tuple(answers.answer_n[i] for i in draw),
            )
        )
        for draw in draws
    )


def summarise(problems_N: Sequence[Answers], ks: Sequence[int]) -> dict[str, Estimate]:
    """mean@n, and pass@k and maj@k for each k greater than 1.

    All problems have the same number of answers n. pass@1 and maj@1 would be mean@n.
    """
    n = len(problems_N[0].accuracy_n)
    assert all(len(p.accuracy_n) == n for p in problems_N), "as many answers to each problem"
    result = {f"mean@{n}": estimate([fmean(p.accuracy_n) for p in problems_N])}
    for k in (k for k in ks if k > 1):
        right = [round(sum(p.accuracy_n)) for p in problems_N]
        result[f"pass@{k}"] = estimate([pass_at_k(n, c, k) for c in right])
        result[f"maj@{k}"] = estimate(
            [majority_at_k(p, k, seed) for seed, p in enumerate(problems_N)]
        )
    return result


def powers_of_two(n: int) -> list[int]:
    """2, 4, 8 ... below n, and n."""
    return [2**i for i in range(1, n.bit_length()) if 2**i < n] + [n]
