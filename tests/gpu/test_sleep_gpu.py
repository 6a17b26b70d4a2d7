"""An engine on a GPU gives its memory back, and wakes with the weights that it had."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gpg_megatron.bridge.protocol import RECEIVER
from gpg_megatron.config.sections import RolloutConfig
from gpg_megatron.host.reaper import (
    RUN_ID_VARIABLE,
    cleanup_run,
    new_run_id,
    scratch_directory,
    start_reaper,
)
from gpg_megatron.rollout.fleet import Fleet
from gpg_megatron.rollout.spec import EngineSpec
from tests.stack.test_rollout import request
from tests.tiny import make_tiny_model

SHARE = 0.5
"""Of the GPU, for the engine."""


def taken() -> int:
    """Bytes of the GPU, of all processes."""
    free, total = torch.cuda.mem_get_info()
    return int(total - free)


def test_an_engine_sleeps_and_wakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (RUN_ID_VARIABLE, "SPT_NOENV"):  # start_reaper sets them: undone at the end
        monkeypatch.setenv(name, "")
    run_id = new_run_id()
    start_reaper(run_id)
    try:
        fleet = Fleet.start(spec(tmp_path, run_id), run_id=run_id, log_dir=tmp_path)
        fleet.wait_ready()
        before, awake = fleet.generate([request(temperature=0.0, n=1)]), taken()
        fleet.sleep(1)
        asleep = taken()
        fleet.wake(["weights", "kv_cache"])
        after = fleet.generate([request(temperature=0.0, n=1)])
        fleet.close()
    finally:
        cleanup_run(run_id)
    total = torch.cuda.get_device_properties().total_memory
    assert awake - asleep > 0.8 * SHARE * total, f"{awake - asleep} bytes were given back"
    assert [x.token_ids.tolist() for x in after] == [x.token_ids.tolist() for x in before]


def spec(folder: Path, run_id: str) -> EngineSpec:
    """Of a small engine that takes half of the GPU."""
    return EngineSpec(
        rollout=RolloutConfig(enforce_eager=True, gpu_memory_utilization=SHARE),
        model_path=str(make_tiny_model(folder / "model", hidden_size=256, num_heads=8)),
        device="cuda",
        max_model_len=256,
        max_num_seqs=16,
        max_num_batched_tokens=2048,
        gives_memory_back=True,
        worker_extension=RECEIVER,
        scratch=scratch_directory(run_id),
    )
