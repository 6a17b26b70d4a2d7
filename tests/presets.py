"""The objective of a preset, without a configuration file."""

from __future__ import annotations

from typing import Any

from gpg_megatron.config.algorithm import PRESETS, AlgorithmConfig
from gpg_megatron.config.off_policy import Sampled, settled

ON_POLICY = Sampled(n_updates=1, stale=False, carried=False, truncated=False, other_type=False)


def as_written(preset: str, **explicit: Any) -> AlgorithmConfig:
    """The keys of a preset, with those that are given explicitly in their place."""
    return AlgorithmConfig(**{"preset": preset} | dict(PRESETS[preset]) | explicit)


def from_preset(preset: str, **explicit: Any) -> AlgorithmConfig:
    """as_written; what is left to auto is that of a run whose answers are all of the present
    weights."""
    return settled(as_written(preset, **explicit), ON_POLICY)
