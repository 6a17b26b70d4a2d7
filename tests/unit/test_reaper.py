"""The reaper: a run's processes and segments end with their owner, other runs' stay."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing import resource_tracker, shared_memory
from pathlib import Path

import pytest

from gpg_megatron.host import reaper as reaper_module
from gpg_megatron.host.reaper import (
    RUN_ID_VARIABLE,
    SHARED_MEMORY,
    Sampler,
    cleanup_run,
    new_run_id,
    scratch_directory,
    start_reaper,
)

LIMIT_S = 20.0

# An owner with a child and a detached grandchild with an empty environment; the child
# ignores SIGTERM and holds a segment. Each line names a process or a segment.
OWNER = """
import os, subprocess, sys, time
from gpg_megatron.host.reaper import start_reaper
print(start_reaper(sys.argv[1]), flush=True)
child = subprocess.Popen([sys.executable, "-c", sys.argv[2]], start_new_session=True)
print(child.pid, flush=True)
time.sleep(600)
"""
CHILD = """
import signal, subprocess, sys, time
from multiprocessing import resource_tracker, shared_memory
signal.signal(signal.SIGTERM, signal.SIG_IGN)
segment = shared_memory.SharedMemory(create=True, size=4096)
resource_tracker.unregister("/" + segment.name, "shared_memory")
stray = subprocess.Popen(["sleep", "600"], env={}, start_new_session=True)
print(stray.pid, segment.name, flush=True)
time.sleep(600)
"""


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _is_gone(pid: int) -> bool:
    return not _alive(pid)


def _wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, f"waited {LIMIT_S} s for {what}"
        time.sleep(0.05)


@pytest.fixture
def run_id(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(reaper_module, "TERM_GRACE_S", 0.5)
    for variable in (RUN_ID_VARIABLE, "SPT_NOENV"):  # restored after the test
        monkeypatch.setenv(variable, "")
        monkeypatch.delenv(variable)
    name = new_run_id()
    yield name
    cleanup_run(name)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_nothing_outlives_the_owner(run_id: str, number: signal.Signals) -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, run_id, CHILD],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        # A shell's background jobs ignore Ctrl-C, and would hand that down.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert owner.stdout is not None
    reaper, child = int(owner.stdout.readline()), int(owner.stdout.readline())
    stray, segment = owner.stdout.readline().split()
    state = scratch_directory(run_id) / "reaper.json"
    _wait_until(lambda: state.exists() and segment in state.read_text(), "the first samples")
    owner.send_signal(number)
    owner.wait(timeout=LIMIT_S)
    owner.stdout.close()
    for pid in (reaper, child, int(stray)):
        _wait_until(partial(_is_gone, pid), f"process {pid} to end")
    assert not (SHARED_MEMORY / segment).exists()
    assert not scratch_directory(run_id).exists()


def test_cleanup_ends_this_run_and_no_other(run_id: str) -> None:
    other_id = new_run_id()
    mark = {**os.environ, RUN_ID_VARIABLE: other_id}
    other = subprocess.Popen(["sleep", "600"], env=mark)
    foreign = shared_memory.SharedMemory(create=True, size=4096)
    resource_tracker.unregister(f"/{foreign.name}", "shared_memory")
    try:
        reaper = start_reaper(run_id)
        mine = subprocess.Popen([sys.executable, "-c", CHILD], stdout=subprocess.PIPE, text=True)
        assert mine.stdout is not None
        stray, segment = mine.stdout.readline().split()
        mine.stdout.close()
        started = time.monotonic()
        cleanup_run(run_id)
        assert time.monotonic() - started < LIMIT_S
        assert mine.wait(timeout=1) == -signal.SIGKILL
        assert not any(_alive(pid) for pid in (mine.pid, int(stray), reaper))
        assert not (SHARED_MEMORY / segment).exists()
        assert not scratch_directory(run_id).exists()
        assert other.poll() is None
        assert (SHARED_MEMORY / foreign.name).exists()
    finally:
        foreign.close()
        (SHARED_MEMORY / foreign.name).unlink(missing_ok=True)
        other.kill()
        other.wait()


def test_cleanup_may_be_called_again_and_without_a_reaper(run_id: str) -> None:
    mark = {**os.environ, RUN_ID_VARIABLE: run_id}
    child = subprocess.Popen(["sleep", "600"], env=mark)
    cleanup_run(run_id)
    assert child.wait(timeout=1) == -signal.SIGTERM
    cleanup_run(run_id)


def test_a_segment_of_a_dead_process_is_remembered(run_id: str) -> None:
    """Killed between start and cleanup: only the samples know whose segment it was."""
    start_reaper(run_id)
    child = subprocess.Popen([sys.executable, "-c", CHILD], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    _, segment = child.stdout.readline().split()
    child.stdout.close()
    state = scratch_directory(run_id) / "reaper.json"
    _wait_until(lambda: state.exists() and segment in state.read_text(), "a sample of the segment")
    child.kill()
    child.wait()
    assert (SHARED_MEMORY / segment).exists()
    cleanup_run(run_id)
    assert not (SHARED_MEMORY / segment).exists()


def test_a_mapped_segment_is_not_unlinked(run_id: str) -> None:
    """Another program still uses a segment that the run had opened."""
    segment = shared_memory.SharedMemory(create=True, size=4096)
    try:
        user = subprocess.Popen(
            [sys.executable, "-c", ATTACH, segment.name],
            env={**os.environ, RUN_ID_VARIABLE: run_id},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert user.stdout is not None
        user.stdout.readline()
        user.stdout.close()
        sampler = Sampler(run_id)
        assert [p.pid for p in sampler.sample()] == [user.pid]
        assert sampler.segments == {segment.name}
        cleanup_run(run_id)
        assert user.wait(timeout=1) == -signal.SIGTERM
        assert (SHARED_MEMORY / segment.name).exists()
    finally:
        segment.close()
        segment.unlink()


ATTACH = """
import mmap, os, sys, time
fd = os.open("/dev/shm/" + sys.argv[1], os.O_RDWR)
memory = mmap.mmap(fd, 4096)
print("attached", flush=True)
time.sleep(600)
"""


def test_semaphores_count_as_segments(run_id: str) -> None:
    """sem_open maps them under another name than the one that stays in /dev/shm."""
    script = (
        "import multiprocessing as m, time; lock = m.get_context('spawn').Lock();"
        "print(lock._semlock.name, flush=True); time.sleep(600)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", script],
        env={**os.environ, RUN_ID_VARIABLE: run_id},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    name = "sem." + holder.stdout.readline().strip().lstrip("/")
    holder.stdout.close()
    sampler = Sampler(run_id)
    sampler.sample()
    assert name in sampler.segments
    cleanup_run(run_id)
    holder.wait(timeout=1)
    assert not (SHARED_MEMORY / name).exists()


def test_the_reaper_ends_at_once_when_its_owner_is_gone(tmp_path: Path) -> None:
    """As it is started: from its path, wherever, and with nothing to say."""
    command = [sys.executable, "-P", reaper_module.__file__, "0" * 12, "999999999"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=LIMIT_S)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_reaper_imports_nothing_of_the_project() -> None:
    script = (
        "import runpy, sys; runpy.run_path(sys.argv[1]);"
        "print([name for name in sys.modules if name.startswith('gpg_megatron')])"
    )
    command = [sys.executable, "-P", "-c", script, reaper_module.__file__]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
    assert (done.stdout, done.stderr) == ("[]\n", "")
