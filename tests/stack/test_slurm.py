"""The files for sbatch, with a real SLURM of two nodes on this machine."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.shared_memory import abandoned_segments, all_segments
from tests.stack import flagship
from tests.stack.jobs import processes_with
from tests.stack.slurm_cluster import SlurmCluster, missing_programs
from tests.tiny import make_answering_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(
        bool(missing_programs()),
        reason=f"no SLURM here: {missing_programs()}; Debian's packages are slurm-wlm and munge",
    ),
]
JOB_LIMIT_S = 1000.0
SBATCH = flagship.ROOT / "launch" / "slurm"
# What a shell may hold that submits, from other launchers; each of them would break the run.
STALE = {
    "RANK": "7",
    "WORLD_SIZE": "99",
    "MASTER_ADDR": "elsewhere.invalid",
    "NNODES": "9",
    "RAY_ADDRESS": "elsewhere.invalid:1",
    "PYTHONPATH": "/nowhere",
    "GPG_RUN_ID": "stale",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, development_data: Path) -> Path:
    folder = tmp_path_factory.mktemp("slurm")
    make_answering_model(folder / "model")
    flagship.write_raw_data(development_data, folder / "raw")
    return folder


@pytest.fixture(scope="module")
def cluster() -> Iterator[SlurmCluster]:
    with (
        tempfile.TemporaryDirectory() as folder,
        SlurmCluster(Path(folder) / "c", num_nodes=2) as cluster,
    ):
        yield cluster


def submit(cluster: SlurmCluster, place: Path, file: str, script: str, *overrides: str) -> int:
    """A job without GPUs; its output and its run directory are called by the file."""
    given = flagship.environment(place / "model", place / "raw", place, place / file, **STALE)
    del given["PATH"]
    return cluster.submit(
        SBATCH / file,
        f"launch/{script}",
        *flagship.OVERRIDES,
        *overrides,
        options=["--gpus-per-node=0", f"--output={place / file}.log"],
        environment=given,
    )


def wait_for(cluster: SlurmCluster, job: int, log: Path, end: str = "COMPLETED") -> str:
    """The job's output once it has come to its end, with nothing left of it."""
    deadline = time.monotonic() + JOB_LIMIT_S
    while (state := cluster.state(job)) in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"):
        assert time.monotonic() < deadline, f"{state}: {log.read_text()}\n{cluster.logs()}"
        time.sleep(0.5)
    assert state == end, f"{state}: {log.read_text()}"
    deadline = time.monotonic() + 20
    while left := _processes_of(cluster, job):
        assert time.monotonic() < deadline, left
        time.sleep(0.2)
    return log.read_text()


def _processes_of(cluster: SlurmCluster, job: int) -> list[psutil.Process]:
    wanted = {"SLURM_JOB_ID": str(job), "SLURM_CONF": cluster.environment()["SLURM_CONF"]}
    return processes_with(wanted)


def test_two_nodes_train(cluster: SlurmCluster, place: Path) -> None:
    before = all_segments()
    file = "several_nodes.sbatch"
    job = submit(cluster, place, file, "run_qwen2-7b_math_megatron.sh")
    printed = wait_for(cluster, job, place / f"{file}.log")
    print(printed)
    assert f"[slurm] job {job}, restart 0, nodes n[1-2]" in printed
    assert printed.count("step 2/2") == 1, "node 0 alone reports"
    flagship.check_metrics(flagship.read_metrics(place / file))
    assert not abandoned_segments(before)


def test_a_job_near_its_time_limit_is_queued_again_and_goes_on(
    cluster: SlurmCluster, place: Path
) -> None:
    """SLURM's signal before the limit, sent by hand."""
    file, steps = "one_node.sbatch", 8
    overrides = (f"trainer.total_training_steps={steps}", "checkpoint.save_freq=1")
    before = all_segments()
    job = submit(cluster, place, file, "run_qwen2-7b_math.sh", *overrides)
    log = place / f"{file}.log"
    saved = place / file / "checkpoints" / "step_2" / "complete.json"
    deadline = time.monotonic() + JOB_LIMIT_S
    while not saved.exists():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)
    done = cluster.run("scancel", "--batch", "--signal=USR1", str(job))
    assert done.returncode == 0, done.stderr
    printed = wait_for(cluster, job, log)
    print(printed)
    assert f"the time limit of job {job} is near: it leaves in order" in printed
    assert f"job {job} is queued again" in printed
    assert f"[slurm] job {job}, restart 1, nodes n1" in printed
    assert "resumed from" in printed and f"step {steps}/{steps}" in printed
    lines = (place / file / "metrics.jsonl").read_text().splitlines()
    numbers = [json.loads(line)["step"] for line in lines]
    assert numbers.count(1) == 1, "it did not begin again"
    assert set(numbers) == set(range(steps + 1)), "and left out no step"
    assert not abandoned_segments(before)


def test_a_job_that_fails_on_one_node_ends_on_all_and_is_not_queued_again(
    cluster: SlurmCluster, place: Path
) -> None:
    file = "several_nodes.sbatch"
    # Node 0 alone looks at the data.
    missing = "data.train_files=[/nowhere.parquet]"
    job = submit(cluster, place, file, "run_qwen2-7b_math_megatron.sh", missing)
    printed = wait_for(cluster, job, place / f"{file}.log", end="FAILED")
    assert "\nerror: data file not found: /nowhere.parquet" in printed, printed
    assert "\nerror: host 0: data file not found: /nowhere.parquet" in printed
    assert printed.count(f"[slurm] job {job}, ") == 1
    assert "Traceback" not in printed
