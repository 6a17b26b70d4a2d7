"""A run on two hosts: the flagship's script twice on this machine, each with its own launcher,
Ray node, ranks, reaper and scratch folder. They find each other through localhost's ports."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.stack import flagship
from tests.stack.jobs import START_LIMIT_S, Job, running_job
from tests.tiny import make_answering_model

SCRIPT = flagship.ROOT / "launch" / "run_qwen2-7b_math_megatron.sh"
FAULT_LIMIT_S = 120.0
"""A launcher that says nothing is given up after 30 s; the rest is for a busy machine."""


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


@contextmanager
def two_hosts(
    place: Path, name: str, *overrides: str, ranks: Sequence[int] = (2, 2)
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
                MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RAY_PORT=str(ray_port),
            )  # fmt: skip
            command: list[str | Path] = [
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


def test_two_hosts_train(place: Path) -> None:
    with two_hosts(place, "whole") as jobs:
        printed = _both_end(jobs, 0, START_LIMIT_S)
    for text in printed:
        print(text)
    assert "step 2/2" in printed[0]
    assert "step" not in printed[1], "host 0 alone reports"
    flagship.check_metrics(jobs[0].metrics())


@pytest.mark.slow
def test_a_host_with_engines_only(place: Path) -> None:
    """It joins by the same command, has an engine and no rank, and ends with the others."""
    with two_hosts(place, "engines_only", ranks=(4, 0)) as jobs:
        jobs[0].wait_for_step(1)
        assert jobs[0].is_running() and jobs[1].is_running()
        assert jobs[0].ranks().keys() == {0, 1, 2, 3} and not jobs[1].ranks()
        names = {process.name() for process in jobs[1].living()}
        assert any(name.startswith("ray::Engine") for name in names), names
        printed = _both_end(jobs, 0, START_LIMIT_S)
    assert "step 2/2" in printed[0] and not printed[1]
    flagship.check_metrics(jobs[0].metrics())


@pytest.fixture
def running(place: Path, request: pytest.FixtureRequest) -> Iterator[tuple[Job, Job]]:
    """Two hosts that have done a step and would go on for hours."""
    endless = ("trainer.total_training_steps=100000", "checkpoint.save_freq=0")
    with two_hosts(place, request.node.name, *endless) as jobs:
        jobs[0].wait_for_step(1)
        assert all([job.is_running() for job in jobs])
        yield jobs


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
