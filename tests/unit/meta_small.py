"""The sizes of the small model that meta_models.py runs."""

from __future__ import annotations

from typing import Any

SMALL: dict[str, Any] = {
    "hidden_size": 256, "ffn_size": 768, "num_heads": 8, "num_kv_heads": 4, "head_dim": 32
}  # fmt: skip
