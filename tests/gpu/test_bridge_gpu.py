"""The bridge on a GPU: the ranks and checks of the CPU tests, policy and engine on one device."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gpg_megatron.host.reaper import new_run_id
from tests.stack.test_bridge import launch
from tests.tiny import make_tiny_model

GAP = 0.1
"""bf16 on both sides, kernels that differ."""


@pytest.mark.parametrize("transport", ["auto", "shm", "cuda_ipc"])
def test_published_weights_are_what_the_engine_computes_with(
    transport: str, tmp_path: Path
) -> None:
    run_id = new_run_id()
    job = {
        "run_id": run_id,
        "checkpoints": [
            str(make_tiny_model(tmp_path / name, hidden_size=256, num_heads=8, seed=seed))
            for seed, name in enumerate("AB")
        ],
        "engine_tp": 1,
        "num_engines": 1,
        "transport": transport,
        "dtype": "bf16",
        "device": "cuda",
        "layouts": {"one rank": {}},
        "out": str(tmp_path / "results.json"),
    }
    (tmp_path / "job.json").write_text(json.dumps(job))
    launch(tmp_path / "job.json", run_id, world=1, device="cuda")
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results) == 2
    for result in results:
        assert result["gap"] <= GAP, result
        assert result["sent_bytes"] == result["needed_bytes"], result
