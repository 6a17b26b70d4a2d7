"""The program meta_models.py, and the sizes of the small model in it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SMALL: dict[str, Any] = {
    "hidden_size": 256, "ffn_size": 768, "num_heads": 8, "num_kv_heads": 4, "head_dim": 32
}  # fmt: skip


def megatron_says(*arguments: str) -> Any:
    """What tests/unit/meta_models.py prints."""
    command = [sys.executable, "-m", "tests.unit.meta_models", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])
