"""A save of the flagship at its full size: no rank writes more than it holds, and together they
write what the dry run says."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.large_layouts import QWEN2_7B
from gpg_megatron.config.sections import Config, PolicyConfig
from gpg_megatron.layout.topology import policy_grid
from gpg_megatron.start.host_memory import rank_host_memory
from gpg_megatron.start.run_plan import stage_of

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tp", "pp", "dp", "ranks"), [(1, 1, 8, (0, 7)), (2, 2, 2, (0, 6))], ids=["dp8", "tp2-pp2-dp2"]
)
def test_bytes_written_are_bytes_held(tp: int, pp: int, dp: int, ranks: tuple[int, ...]) -> None:
    command = [sys.executable, "-m", "tests.unit.meta_saved", f"{tp}:{pp}:{dp}", *map(str, ranks)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-2000:]
    policy = PolicyConfig(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        data_parallel_size=dp,
        use_distributed_optimizer=True,
        max_tokens_per_micro_batch=1024,
    )
    config = replace(Config(), policy=policy)
    grid = policy_grid(policy, QWEN2_7B)
    for rank, found in zip(ranks, json.loads(done.stdout.splitlines()[-1]), strict=True):
        stage = stage_of(config, QWEN2_7B, grid, rank // (tp * dp), on_gpus=True)
        replica = rank // tp % dp
        expected = rank_host_memory(
            config,
            stage.memory,
            n_parameters=stage.n_parameters,
            n_in_experts=0,
            largest=stage.largest,
            replica=replica,
        )
        parameters = stage.memory.parameters
        assert found["read"] == found["held"] + parameters
        # Norms are on every tensor-parallel rank, and written by the first.
        assert found["written"] == pytest.approx(
            found["held"] + (parameters if replica == 0 else 0), rel=1e-3
        )
        assert found["written"] == pytest.approx(expected.written, rel=1e-3)
        assert found["shards"] < 8 * len(ranks) * 28 * 14
