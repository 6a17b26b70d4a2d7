"""A run on two hosts: the flagship's script twice on this machine, each with its own launcher,
Ray node, ranks, reaper and scratch folder, and a name and a network of its own where this user may
make them."""

from __future__ import annotations

import os
import re
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.stack import flagship
from tests.stack.jobs import START_LIMIT_S, Job, running_job
from tests.stack.two_hosts import TwoHosts, two_hosts_here
from tests.tiny import make_answering_model

SCRIPT = flagship.ROOT / "launch" / "run_qwen2-7b_math_megatron.sh"
FAULT_LIMIT_S = 120.0
"""A launcher that says nothing is given up after 20 s; the rest is for a busy machine."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, development_data: Path) -> Path:
    folder = tmp_path_factory.mktemp("hosts")
    make_answering_model(folder / "model")
    flagship.write_raw_data(development_data, folder / "raw")
    return folder


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@pytest.fixture(scope="module")
def network() -> Iterator[TwoHosts]:
    with two_hosts_here() as hosts:
        yield hosts


@contextmanager
def two_hosts(
    network: TwoHosts, place: Path, name: str, *overrides: str, ranks: Sequence[int] = (2, 2)
) -> Iterator[tuple[Job, Job]]:
    """The script on both; one of the two engines on each, and so many of the four ranks."""
    port, ray_port = _free_ports(2)
    output = place / name
    with ExitStack() as stack:
        jobs: list[Job] = []
        for rank, n_ranks in enumerate(ranks):
            environment = flagship.environment(
                place / "model", place / "raw", place, output,
                NNODES="2", NODE_RANK=str(rank), NPROC_PER_NODE=str(n_ranks),
                MASTER_ADDR=network.address, MASTER_PORT=str(port), RAY_PORT=str(ray_port),
                TORCH_CPP_LOG_LEVEL="ERROR",  # no name server is there, and it would say so
            )  # fmt: skip
            command: list[str | Path] = [
                *network.enter(rank),
                SCRIPT,
                *flagship.OVERRIDES,
                "rollout.num_engines=2",
                *overrides,
            ]
            log = place / f"{name}_{rank}.log"
            jobs.append(
                stack.enter_context(
                    running_job(command, output=output, log=log, environment=environment)
                )
            )
        yield jobs[0], jobs[1]


def _both_end(jobs: tuple[Job, Job], code: int, limit_s: float) -> list[str]:
    """Both are looked at while they run, so that what they start is known."""
    deadline = time.monotonic() + limit_s
    while any([job.is_running() for job in jobs]):
        assert time.monotonic() < deadline, [job.log.read_text() for job in jobs]
        time.sleep(0.1)
    return [job.ends(code) for job in jobs]


def test_two_hosts_train(network: TwoHosts, place: Path) -> None:
    with two_hosts(network, place, "whole") as jobs:
        printed = _both_end(jobs, 0, START_LIMIT_S)
    for text in printed:
        print(text)
    assert "step 2/2" in printed[0]
    assert "step" not in printed[1], "host 0 alone reports"
    flagship.check_metrics(jobs[0].metrics())


@pytest.mark.slow
def test_a_host_with_engines_only(network: TwoHosts, place: Path) -> None:
    """It joins by the same command, has an engine and no rank, and ends with the others."""
    with two_hosts(network, place, "engines_only", ranks=(4, 0)) as jobs:
        jobs[0].wait_for_step(1)
        assert jobs[0].is_running() and jobs[1].is_running()
        assert jobs[0].ranks().keys() == {0, 1, 2, 3} and not jobs[1].ranks()
        names = {process.name() for process in jobs[1].living()}
        assert any(name.startswith("ray::Engine") for name in names), names
        printed = _both_end(jobs, 0, START_LIMIT_S)
    assert "step 2/2" in printed[0] and not printed[1]
    flagship.check_metrics(jobs[0].metrics())


@pytest.fixture
def running(
    network: TwoHosts, place: Path, request: pytest.FixtureRequest
) -> Iterator[tuple[Job, Job]]:
    """Two hosts that have done a step and would go on for hours."""
    endless = ("trainer.total_training_steps=100000", "checkpoint.save_freq=0")
    with two_hosts(network, place, request.node.name, *endless) as jobs:
        jobs[0].wait_for_step(1)
        assert all([job.is_running() for job in jobs])
        yield jobs


@pytest.mark.slow
def test_a_killed_rank_ends_both_hosts(running: tuple[Job, Job]) -> None:
    names = [{process.name() for process in job.living()} for job in running]
    assert {"gcs_server", "raylet"} <= names[0]
    assert "raylet" in names[1] and "gcs_server" not in names[1], "one cluster, two nodes"
    engines = [[name for name in some if name.startswith("ray::Engine")] for some in names]
    assert all(engines), "one on each"
    assert running[1].ranks().keys() == {2, 3}
    running[1].ranks()[3].kill()
    first, second = _both_end(running, 1, FAULT_LIMIT_S)
    assert "error: host 1: policy rank 3 ended: killed by SIGKILL" in first
    assert "error: policy rank 3 ended: killed by SIGKILL" in second
    assert "Traceback" not in first + second


@pytest.mark.slow
def test_a_killed_launcher_ends_both_hosts(running: tuple[Job, Job]) -> None:
    os.kill(running[1].process.pid, signal.SIGKILL)
    assert running[1].process.wait(timeout=10) == -signal.SIGKILL
    deadline = time.monotonic() + FAULT_LIMIT_S
    while running[0].is_running():
        assert time.monotonic() < deadline, running[0].log.read_text()
        time.sleep(0.1)
    assert "error: host 1: its launcher " in running[0].ends(1)
    running[1].ends(-signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_two_hosts_go_on_after_a_killed_rank_and_name_a_lost_host(place: Path) -> None:
    """Both start again by themselves, from the newest checkpoint; a host that is lost ends the run
    within 30 s and the time that the ranks need to end."""
    overrides = (
        "trainer.total_training_steps=100000",
        "trainer.max_restarts=9",
        "checkpoint.save_freq=1",
        "validation.before_train=false",
        "rollout.num_engines=1",
        "policy.pipeline_model_parallel_size=1",
    )
    with (
        two_hosts_here(apart=True) as network,
        two_hosts(network, place, "again", *overrides, ranks=(1, 1)) as jobs,
    ):
        jobs[0].wait_for_step(2)
        assert jobs[1].is_running()
        jobs[1].ranks()[1].kill()
        again = "from step (\\d+): policy rank 1 ended: killed by SIGKILL"
        while not (said := re.search(f"restart 1 of 9, {again}", jobs[0].log.read_text())):
            assert all([job.is_running() for job in jobs])
            time.sleep(0.5)
        assert int(said[1]) >= 1
        jobs[0].wait_for_step(jobs[0].metrics()[-1]["step"] + 1)
        assert jobs[1].is_running() and jobs[1].ranks().keys() == {1}
        began = time.monotonic()
        network.cut()
        first, second = _both_end(jobs, 1, FAULT_LIMIT_S)
        seconds = time.monotonic() - began
    assert f"resumed from {jobs[0].output}/checkpoints/step_{said[1]}" in first
    assert "error: host 1: its launcher has been silent for 20 s" in first
    assert "error: host 0: its launcher has been silent for 20 s" in second
    assert seconds < 45, "20 s, and what ends ranks, engines and Ray"
    assert "Traceback" not in first + second
