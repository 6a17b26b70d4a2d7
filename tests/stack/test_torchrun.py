"""Bare torchrun on two hosts, with engines in a Ray cluster that was there before."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from tests.stack.jobs import Job, processes_with, running_job, write_tiny_run
from tests.stack.two_hosts import ADDRESSES, TwoHosts, two_hosts_here

MARK = "GPG_TEST_CLUSTER"
EVERYWHERE = {
    # Ray's nodes and callers have the same one.
    "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32),
    # No name server is there: gloo would ask it for the host's own address.
    "GLOO_SOCKET_IFNAME": "eth", "TORCH_CPP_LOG_LEVEL": "ERROR",
}  # fmt: skip
RAY_PORT, RANKS_PORT = 6399, 29511
END_LIMIT_S = 120.0


def of_cluster(mark: str) -> list[psutil.Process]:
    """Ray's daemons and what they started."""
    return processes_with({MARK: mark})


@contextmanager
def ray_cluster(network: TwoHosts, folder: Path) -> Iterator[str]:
    """Its head is host 1, with room for one engine; host 0 has none, it only calls. Yields a mark
    in its processes' environment."""
    mark = uuid.uuid4().hex
    sockets = Path(tempfile.mkdtemp(prefix="gpg-"))  # whose paths must be short
    environment = os.environ | EVERYWHERE | {MARK: mark}
    head = ["--head", f"--port={RAY_PORT}", "--include-dashboard=false", "--num-cpus=1"]
    head += ["--ray-client-server-port=10099"]
    node = [f"--address={ADDRESSES[1]}:{RAY_PORT}", "--num-cpus=0"]
    try:
        for host, own in ((1, head), (0, node)):
            options = [
                f"--node-ip-address={ADDRESSES[host]}", f"--temp-dir={sockets}/{host}",
                "--num-gpus=0", "--object-store-memory=268435456", "--disable-usage-stats",
                # Two hosts on one machine: Ray's fixed ports and ranges are those of a host.
                "--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0",
            ]  # fmt: skip
            start = [sys.executable, "-m", "ray.scripts.scripts", "start", *own, *options]
            with (folder / f"ray_{host}.log").open("w") as log:  # a pipe would stay open
                done = subprocess.run(
                    [*network.enter(host), *start], env=environment, stdout=log, stderr=log
                )
            assert done.returncode == 0, Path(log.name).read_text()
        yield mark
    finally:
        for process in of_cluster(mark):
            with suppress(psutil.Error):
                process.kill()
        shutil.rmtree(sockets, ignore_errors=True)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_two_hosts_join_a_cluster_that_is_there(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Rank 0's host has no room for an engine, as a pod beside KubeRay's: the engine is on the
    other one. The run ends with its engine; the cluster stays."""
    folder = tmp_path_factory.mktemp("bare_torchrun")
    config = write_tiny_run(
        folder,
        policy={"pipeline_model_parallel_size": 2},
        rollout={"ray_address": f"{ADDRESSES[1]}:{RAY_PORT}"},
        trainer={"output_dir": str(folder / "run")},
    )
    with ExitStack() as stack:
        network = stack.enter_context(two_hosts_here(apart=True))
        mark = stack.enter_context(ray_cluster(network, folder))
        jobs: list[Job] = []
        for host in (0, 1):
            command: list[str | Path] = [
                *network.enter(host), sys.executable, "-m", "torch.distributed.run", "--nnodes=2",
                f"--node-rank={host}", f"--master-addr={ADDRESSES[0]}",
                f"--master-port={RANKS_PORT}", "--nproc-per-node=1",
                "-m", "gpg_megatron.start.train", "--config", config,
            ]  # fmt: skip
            job = running_job(
                command,
                output=folder / "run",
                log=folder / f"{host}.log",
                environment=os.environ | EVERYWHERE,
            )
            jobs.append(stack.enter_context(job))
        jobs[0].wait_for_step(1)
        names = [process.name() for process in of_cluster(mark)]
        assert any(name.startswith("ray::Engine") for name in names), names
        assert jobs[0].is_running() and jobs[1].is_running()
        printed = jobs[0].ends(0, limit_s=END_LIMIT_S), jobs[1].ends(0, limit_s=END_LIMIT_S)
        assert "step 2/2" in printed[0] and "step" not in printed[1]
        psutil.wait_procs([p for p in of_cluster(mark) if "Engine" in p.name()], timeout=20)
        names = [process.name() for process in of_cluster(mark)]
        assert names.count("raylet") == 2 and "gcs_server" in names, "it is not the run's"
        assert not [name for name in names if "Engine" in name or "VLLM" in name]
    assert [row["step"] for row in jobs[0].metrics()] == [0, 1, 2]
