"""The section reward."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Optional

from gpg_megatron.config.paths import file_path
from gpg_megatron.config.ranges import ranged

Scorer = Literal[
    "auto", "exact_match", "gsm8k", "math", "math_verify", "verl_gsm8k", "verl_math", "custom"
]


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """Scoring of completions."""

    scorer: Scorer = "auto"
    """auto: chosen by each row's data_source."""
    by_source: dict[str, str] = field(default_factory=dict)
    """data_source pattern (shell style) -> scorer; the first that fits comes before `scorer`."""
    custom_function: Optional[str] = file_path(None)
    """FILE.py:NAME of the scorer called custom."""
    weights: dict[str, float] = field(default_factory=lambda: {"answer": 1.0})
    """What the score is the sum of: answer (the scorer's score), format, overlong, length."""
    format_pattern: Optional[str] = None
    """Regular expression that a response with a right format contains; None: the scorer's own
    notion of format."""
    overlong_buffer: int = ranged(0, at_least=0)
    """Tokens before rollout.max_response_length over which the part overlong falls from 0 to -1."""
    num_workers: int = ranged(1, at_least=1)
    """Scoring processes."""
    tolerance: float = ranged(0.0, at_least=0)
    """Largest relative difference of two numbers that math and math_verify call equal."""
    timeout_s: float = ranged(10.0, above=0)
    """Limit for one answer."""
    timeout_score: float = ranged(0.0)
    """Score of an answer that takes too long or too much memory, or crashes its scorer."""
    retries: int = ranged(0, at_least=0)
    """How often an answer is judged again whose scorer took too long or raised, as one that asks a
    service may; above 0 the run also waits while no answer of a batch gets a verdict."""
    retry_wait_s: float = ranged(1.0, at_least=0)
    """Pause before the first retry; twice as long before each later one, at most a minute."""
    outage_limit_s: float = ranged(3600.0, at_least=0)
    """Longest wait for a scorer that gives no verdict at all."""
    memory_limit_mb: Optional[int] = ranged(2048, at_least=1)
    """Private memory of each scoring process, MiB; None: no limit."""
