"""math-verify as its authors set it, as a scorer of the pool."""

from __future__ import annotations

import logging

from math_verify import parse, verify

from gpg_megatron.reward.scorers import Verdict

logging.getLogger("math_verify").setLevel(logging.ERROR)


def library(response: str, ground_truth: str) -> Verdict:
    """Both texts as the library reads them; the pool's limits stand in for its alarms."""
    truth = parse(f"\\boxed{{{ground_truth}}}", parsing_timeout=None)
    answer = parse(response, parsing_timeout=None)
    right = float(verify(truth, answer, timeout_seconds=None))
    return Verdict(right, right, {"library": right}, None)


SCORERS = {"math_verify": library}
