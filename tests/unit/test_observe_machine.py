"""What a run tells of its GPUs, cores and operations: by hand, on a machine without GPUs."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from gpg_megatron.config.sections import TrainerConfig
from gpg_megatron.host import cores
from gpg_megatron.observe import gpus
from gpg_megatron.observe.gpus import GpuWatch, Reading, gpu_metrics, read_gpus
from gpg_megatron.observe.trace import trace_of


def test_metrics_of_gpus() -> None:
    readings = [Reading(3 * 10**9, 0.5), Reading(7 * 10**9, 1.0), Reading(10**9, None)]
    assert gpu_metrics(readings) == {"memory/gpu_gb": 7.0, "throughput/gpu_busy": 0.75}
    assert gpu_metrics(readings[2:]) == {"memory/gpu_gb": 1.0}
    assert gpu_metrics([]) == {}


def test_the_watch_gives_what_was_read_since_it_was_last_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gpus, "INTERVAL_S", 0.01)
    used = iter(range(1, 10**9))
    with closing(GpuWatch(lambda: [Reading(next(used) * 10**9, None)])) as watch:
        first = watch.take()["memory/gpu_gb"]
        time.sleep(0.2)
        assert watch.take()["memory/gpu_gb"] > first
    watch.take()
    time.sleep(0.05)
    assert watch.take() == {}, "it has ended"


def test_without_nvml_torch_tells_of_the_ranks_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (30 * 10**9, 80 * 10**9))
    assert read_gpus() == [Reading(50 * 10**9, None)]


def test_the_steps_and_ranks_that_are_asked_for_are_traced(tmp_path: Path) -> None:
    config = TrainerConfig(output_dir=str(tmp_path), profile_steps=(2, 3), profile_ranks=(1,))
    for rank in (0, 1):
        trace = trace_of(config, rank)
        for step in (1, 2, 3):
            with trace(step):
                torch.ones(8, 8) @ torch.ones(8, step)
    files = sorted(tmp_path.rglob("*"))
    assert [file.name for file in files] == [
        "profile", "step_2_rank_1.json.gz", "step_3_rank_1.json.gz",
    ]  # fmt: skip
    events = json.loads(gzip.decompress(files[2].read_bytes()))["traceEvents"]
    (product,) = [e for e in events if e["name"] == "aten::mm"]
    assert product["args"]["Input Dims"][:2] == [[8, 8], [8, 3]]


def test_a_rank_that_is_bound_shares_the_hosts_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight ranks on two NUMA nodes of 64 cores, each bound to one of them."""
    affinity = {0: set(range(64)), os.getppid(): set(range(128))}
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: affinity[pid])
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert cores.threads_of_rank() == 16
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert cores.threads_of_rank() == 64, "no more than it is bound to"


def test_threads_spin_only_where_nothing_runs_beside_them() -> None:
    sleeps = {"OMP_WAIT_POLICY": "passive"}
    assert cores.waiting_variables({}, by_turns=False) == sleeps
    assert cores.waiting_variables({}, by_turns=True) == sleeps | {"GOMP_SPINCOUNT": "1000"}
    by_user = {"GOMP_SPINCOUNT": "5"}
    assert cores.waiting_variables(by_user, by_turns=True) == sleeps | by_user
    assert cores.waiting_variables({"OMP_WAIT_POLICY": "active"}, by_turns=True) == {}


def test_what_a_bound_rank_starts_has_all_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """The agent's cores, which a process that is bound to one of them may still take."""
    everything = os.sched_getaffinity(0)
    if len(everything) < 2:
        pytest.skip("needs two cores")
    monkeypatch.setenv("LOCAL_RANK", "0")
    bound = {min(everything)}

    def child() -> Any:
        code = "import os; print(sorted(os.sched_getaffinity(0)))"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        return set(json.loads(done.stdout))

    agent = subprocess.Popen(["sleep", "60"])
    monkeypatch.setattr(os, "getppid", lambda: agent.pid)
    try:
        os.sched_setaffinity(0, bound)
        assert child() == bound
        with cores.on_all_cores():
            assert child() == everything
        assert child() == bound
    finally:
        os.sched_setaffinity(0, everything)
        agent.kill()
        agent.wait()


def test_ranks_are_bound_where_there_are_several_nodes_and_numactl(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda _: "/usr/bin/numactl")
    (tmp_path / "node0").mkdir()
    assert not cores.can_bind(tmp_path)
    (tmp_path / "node1").mkdir()
    assert cores.can_bind(tmp_path)
    monkeypatch.setattr("shutil.which", lambda _: None)
    assert not cores.can_bind(tmp_path)
