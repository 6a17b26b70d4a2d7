"""What the demo's model and data are."""

from __future__ import annotations

from dataclasses import dataclass

TASK = "largest"
"""A task of gpg_megatron.data.arithmetic; every problem and answer of it has the same length."""


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """Everything that determines the result."""

    seed: int = 1
    hidden_size: int = 128
    intermediate_size: int = 512
    num_layers: int = 4
    num_heads: int = 4
    """Of size hidden_size / num_heads = 32, the smallest that vLLM's CPU attention takes."""
    num_kv_heads: int = 2
    max_vocab_size: int = 300
    """No multiple of 64 or 128: the padding of the vocabulary is part of the demo."""
    warmup_steps: int = 400
    batch_size: int = 64
    """Texts per warm-up step; no problem is seen twice."""
    lr: float = 1.5e-3
    right_phase: float = 0.6
    """Share of the warm-up steps with right answers only."""
    right_share: float = 0.28
    """Share of right answers in the other steps."""
    train_rows: int = 4096
    test_rows: int = 300
