"""The program meta_models.py, and the sizes of the small model in it."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from tests.dist.ranks import fork_ranks

SMALL: dict[str, Any] = {
    "hidden_size": 256, "ffn_size": 768, "num_heads": 8, "num_kv_heads": 4, "head_dim": 32
}  # fmt: skip


def megatron_says(*arguments: str) -> Any:
    """What tests/unit/meta_models.py prints."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        codes = fork_ranks("tests.unit.meta_models", arguments, 1, log)
        assert codes == [0], log.read_text()[-2000:]
        return json.loads(log.read_text().splitlines()[-1])
