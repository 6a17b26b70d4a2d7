"""gpg-train on hosts that lack something: a network, shared memory, room on the disk.

Each test has a host of its own: a namespace of Linux, where this user may make one.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.stack.jobs import START_LIMIT_S, Job, running_job, write_tiny_run

NAMESPACE = ("unshare", "--map-root-user", "--net", "--uts", "--mount", "--")
# An own name that resolves to nothing, and no interface but the loopback one.
ENTER = """
import fcntl, os, socket, struct, subprocess, sys
socket.sethostname("nowhere.invalid")
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
    fcntl.ioctl(any_socket, 0x8914, struct.pack("16sh", b"lo", 0x49))  # SIOCSIFFLAGS: up
if sys.argv[1] != "-":
    size = f"size={sys.argv[1]}"
    subprocess.run(["mount", "-t", "tmpfs", "-o", size, "none", "/dev/shm"], check=True)
os.execvp(sys.argv[2], sys.argv[2:])
"""


def in_namespace(*command: str, shm: str = "-") -> list[str]:
    """The command on a host with nothing but itself. shm: the size of its /dev/shm."""
    return [*NAMESPACE, sys.executable, "-c", ENTER, shm, *command]


@pytest.fixture(scope="module")
def namespaces() -> None:
    """Skips where this user may make none."""
    tried = subprocess.run(in_namespace("true", shm="2m"), capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"no namespace of its own: {tried.stderr.strip()}")


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, problems and config.yaml of a run of two steps on one rank."""
    folder = tmp_path_factory.mktemp("bare")
    write_tiny_run(folder, bridge={"bucket_mb": 1}, logging={"tensorboard": False})
    return folder


def command(folder: Path, name: str, *overrides: str) -> list[str]:
    train = [sys.executable, "-m", "gpg_megatron.start.train", "--config"]
    return [*train, str(folder / "config.yaml"), f"trainer.output_dir={folder / name}", *overrides]


@contextmanager
def started(folder: Path, name: str, *words: str) -> Iterator[Job]:
    with running_job(words, output=folder / name, log=folder / f"{name}.log") as job:
        yield job


@pytest.mark.slow
@pytest.mark.usefixtures("namespaces")
def test_one_host_needs_no_network_and_no_name(job: Path) -> None:
    words = command(job, "alone", "policy.pipeline_model_parallel_size=2")
    with started(job, "alone", *in_namespace(*words)) as run:
        printed = run.ends(0, limit_s=START_LIMIT_S)
    assert [row["step"] for row in run.metrics()] == [0, 1, 2]
    assert "first sync verified" in printed and "Traceback" not in printed


@pytest.mark.slow
@pytest.mark.usefixtures("namespaces")
def test_a_shared_memory_of_2_mb_is_refused(job: Path) -> None:
    words = in_namespace(*command(job, "shm", "bridge.bucket_mb=16"), shm="2m")
    done = subprocess.run(words, capture_output=True, text=True, timeout=START_LIMIT_S)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and "/dev/shm" in line


@pytest.mark.slow
@pytest.mark.usefixtures("namespaces")
def test_a_full_disk_ends_the_run_with_one_line(job: Path) -> None:
    """The run directory is a disk with room for a few steps."""
    mount = 'mkdir -p "$0" && mount -t tmpfs -o size=256k none "$0" && exec "$@"'
    words = command(
        job, "full", "trainer.total_training_steps=10000", "logging.rollout_samples=1000",
        "rollout.max_response_length=64",
    )  # fmt: skip
    with started(job, "full", *in_namespace("sh", "-c", mount, str(job / "full"), *words)) as run:
        printed = run.ends(2, limit_s=START_LIMIT_S)
    assert "Traceback" not in printed
    (line,) = [x for x in printed.splitlines() if x.startswith("error: ")]
    assert line.startswith(f"error: cannot write {job / 'full'}")
    assert line.endswith("No space left on device")


def _imports_torch(process: psutil.Process) -> bool:
    return "libtorch_cpu.so" in Path(f"/proc/{process.pid}/maps").read_text()


def _has_a_reaper(process: psutil.Process) -> bool:
    return any("reaper.py" in " ".join(x.cmdline()) for x in process.children())


@pytest.mark.parametrize("reached", [_imports_torch, _has_a_reaper], ids=lambda f: f.__name__)
def test_ctrl_c_in_the_first_seconds_is_one_line(
    job: Path, reached: Callable[[psutil.Process], bool]
) -> None:
    name = f"interrupted_{reached.__name__}"
    with started(job, name, *command(job, name)) as run:
        while not reached(psutil.Process(run.process.pid)):
            assert run.is_running(), run.log.read_text()
            time.sleep(0.01)
        run.is_running()
        os.killpg(run.process.pid, signal.SIGINT)
        assert run.ends(130) == "stopped by SIGINT\n"
