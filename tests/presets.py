"""The objective of a preset, without a configuration file."""

from __future__ import annotations

from typing import Any

from gpg_megatron.config.algorithm import PRESETS, AlgorithmConfig


def from_preset(preset: str, **explicit: Any) -> AlgorithmConfig:
    """The knobs of a preset, with those that are given explicitly in their place."""
    return AlgorithmConfig(**{"preset": preset} | dict(PRESETS[preset]) | explicit)
