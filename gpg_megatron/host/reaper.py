"""Ends every process and every shared-memory segment of a run, whatever died first.

    owner (launcher) --start_reaper--> reaper, in a session of its own
        |                                 | every second: which processes and which segments
        |                                 | in /dev/shm belong to the run?
        dies, however ------------------> | SIGTERM, SIGKILL, unlink, remove the scratch folder

A process belongs to a run when its environment carries GPG_RUN_ID=<run id>, or when it
descends from one that does, or from the owner after the reaper started. At a normal end the
owner calls cleanup_run. The reaper runs this file by its path, without site-packages: only
the standard library may be imported here. Linux only: it reads /proc.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

RUN_ID_VARIABLE = "GPG_RUN_ID"
SCRATCH_VARIABLE = "GPG_SCRATCH"
"""For those of the run's processes that another host commands, as engines there."""
SHARED_MEMORY = Path("/dev/shm")
SAMPLE_INTERVAL_S = 1.0
TERM_GRACE_S = 3.0
KILL_GRACE_S = 3.0
_TRACKER = b"from multiprocessing.resource_tracker import main"
_MAX_TEMP_PATH = 23
"""Ray puts Unix sockets 62 characters below the scratch folder; the kernel's limit is 107."""
_SAMPLES_UNTIL_FOREIGN = 3


@dataclass(frozen=True, slots=True)
class Process:
    """One process; the pair (pid, started) is never reused."""

    pid: int
    started: int
    """Clock ticks after boot."""
    parent: int


@dataclass(slots=True)
class Sampler:
    """Remembers what belongs to one run: processes and the segments that they opened."""

    run_id: str
    owner: Process | None = None
    """Its descendants belong to the run when they started after since."""
    since: int = 0
    members: set[tuple[int, int]] = field(default_factory=set)
    """(pid, started)."""
    segments: set[str] = field(default_factory=set)
    """File names in /dev/shm."""
    _looked_at: dict[str, int] = field(default_factory=dict)

    def sample(self) -> list[Process]:
        """Look once; returns the living processes of the run."""
        living = _living_processes()
        alive = self._find_members(living)
        self.members = {(p.pid, p.started) for p in alive}
        names = {n for n in _segment_names() if n not in self.segments}
        self._looked_at = {n: self._looked_at.get(n, 0) for n in names}
        if any(count < _SAMPLES_UNTIL_FOREIGN for count in self._looked_at.values()):
            self._looked_at = {n: count + 1 for n, count in self._looked_at.items()}
            self.segments |= names & open_segments(p.pid for p in alive)
        return alive

    def _find_members(self, living: dict[int, Process]) -> list[Process]:
        verdict: dict[int, bool] = {}

        def belongs(process: Process) -> bool:
            if process.pid not in verdict:
                verdict[process.pid] = False
                verdict[process.pid] = self._belongs(process, living, belongs)
            return verdict[process.pid]

        return [p for p in living.values() if belongs(p)]

    def _belongs(
        self,
        process: Process,
        living: dict[int, Process],
        belongs: Callable[[Process], bool],
    ) -> bool:
        """The mark in the environment decides; without one, descent does."""
        if (process.pid, process.started) in self.members:
            return True
        prefix = f"{RUN_ID_VARIABLE}=".encode()
        for entry in _read(process.pid, "environ").split(b"\0"):
            if entry.startswith(prefix):
                return entry == prefix + self.run_id.encode()
        parent = living.get(process.parent)
        if parent is None:
            return False
        own_child = self.owner is not None and parent.pid == self.owner.pid
        return (own_child and process.started > self.since) or belongs(parent)


def new_run_id() -> str:
    """A fresh name for a run: 12 hexadecimal digits."""
    return secrets.token_hex(6)


def scratch_directory(run_id: str) -> Path:
    """Folder for the run's sockets, logs and temporary files; removed at the end of the run."""
    base = tempfile.gettempdir()
    return Path(base if len(base) <= _MAX_TEMP_PATH else "/tmp") / f"gpg-{run_id}"


def start_reaper(run_id: str) -> int:
    """Mark this process's environment as the run's and start its reaper; returns its pid.

    Call it in the process that owns the run, before it starts any other.
    """
    os.environ[RUN_ID_VARIABLE] = run_id
    # setproctitle (Ray, vLLM) writes over /proc/PID/environ unless told to leave it.
    os.environ["SPT_NOENV"] = "1"
    os.environ[SCRATCH_VARIABLE] = str(scratch_directory(run_id))
    scratch_directory(run_id).mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-I", "-S", __file__, run_id, str(os.getpid())]
    quiet = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_RDWR, 0) for fd in (0, 1, 2)]
    return os.posix_spawn(command[0], command, os.environ, file_actions=quiet, setsid=True)


def cleanup_run(run_id: str) -> None:
    """End what is left of a run: its processes, segments, scratch folder and its reaper.

    Only the run's owner may call it: it spares itself, its ancestors and its own resource
    tracker, nobody else.

    Raises:
        TimeoutError: a process outlived SIGKILL.
    """
    sampler = _load(run_id)
    living = _living_processes()
    reapers = _reapers(run_id, living)
    trackers = {
        p.pid
        for p in living.values()
        if p.parent == os.getpid() and _TRACKER in _read(p.pid, "cmdline")
    }
    sweep(sampler, spare=_lineage(os.getpid(), living) | reapers | trackers)
    for pid in reapers:
        _signal(pid, signal.SIGKILL)
        _collect(pid)
    shutil.rmtree(scratch_directory(run_id), ignore_errors=True)


def sweep(sampler: Sampler, spare: set[int]) -> None:
    """End the run's processes except spare, then unlink its segments that nobody maps.

    Python's resource trackers are ended last: they unlink the segments of a killed parent.

    Raises:
        TimeoutError: a process outlived SIGKILL.
    """

    def targets(trackers: bool) -> list[int]:
        alive = [p.pid for p in sampler.sample() if p.pid not in spare]
        return [pid for pid in alive if trackers or _TRACKER not in _read(pid, "cmdline")]

    for number, trackers, grace_s in (
        (signal.SIGTERM, False, TERM_GRACE_S),
        (signal.SIGKILL, False, KILL_GRACE_S),
        (None, True, TERM_GRACE_S),
        (signal.SIGKILL, True, KILL_GRACE_S),
    ):
        deadline = time.monotonic() + grace_s
        signalled: set[int] = set()
        while left := targets(trackers):
            if number is not None:
                for pid in set(left) - signalled:
                    _signal(pid, number)
                    signalled.add(pid)
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)
    _unlink_segments(sampler.segments)
    if left:
        raise TimeoutError(f"processes {left} of run {sampler.run_id} outlived SIGKILL")


def watch(run_id: str, owner_pid: int) -> None:
    """The reaper's own loop: returns when the owner is dead and the run is swept."""
    owner = _stat(owner_pid)
    since = _stat(os.getpid())
    assert since is not None
    sampler = Sampler(run_id, owner=owner, since=since.started)
    saved: tuple[set[tuple[int, int]], set[str]] = (set(), set())
    while owner is not None and _is_alive(owner):
        sampler.sample()
        if (sampler.members, sampler.segments) != saved:
            saved = (set(sampler.members), set(sampler.segments))
            _save(sampler)
        time.sleep(SAMPLE_INTERVAL_S)
    sweep(sampler, spare={os.getpid()})
    shutil.rmtree(scratch_directory(run_id), ignore_errors=True)


def _save(sampler: Sampler) -> None:
    """For cleanup_run, which otherwise would not know what dead processes had opened."""
    path = scratch_directory(sampler.run_id) / "reaper.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    data = {"members": sorted(sampler.members), "segments": sorted(sampler.segments)}
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(data))
    partial.replace(path)


def _load(run_id: str) -> Sampler:
    path = scratch_directory(run_id) / "reaper.json"
    if not path.exists():
        return Sampler(run_id)
    data = json.loads(path.read_text())
    members = {(pid, started) for pid, started in data["members"]}
    return Sampler(run_id, members=members, segments=set(data["segments"]))


def _stat(pid: int) -> Process | None:
    """None for a process that is gone or a zombie."""
    # The name in parentheses may contain spaces and parentheses itself.
    fields = _read(pid, "stat").rpartition(b")")[2].split()
    if not fields or fields[0] in (b"Z", b"X"):
        return None
    return Process(pid=pid, started=int(fields[19]), parent=int(fields[1]))


def _is_alive(process: Process) -> bool:
    """Its parent may change meanwhile: only pid and start time identify it."""
    now = _stat(process.pid)
    return now is not None and now.started == process.started


def _read(pid: int, name: str) -> bytes:
    """Empty when the process is gone or not ours to look at."""
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return b""


def _living_processes() -> dict[int, Process]:
    found = (_stat(int(name)) for name in os.listdir("/proc") if name.isdigit())
    return {process.pid: process for process in found if process is not None}


def _lineage(pid: int, living: dict[int, Process]) -> set[int]:
    """The process and its ancestors."""
    line: set[int] = set()
    while pid in living and pid not in line:
        line.add(pid)
        pid = living[pid].parent
    return line


def _reapers(run_id: str, living: dict[int, Process]) -> set[int]:
    wanted = (os.fsencode(__file__), run_id.encode())
    return {pid for pid in living if tuple(_read(pid, "cmdline").split(b"\0")[3:5]) == wanted}


def _segment_names() -> set[str]:
    return set(os.listdir(SHARED_MEMORY)) if SHARED_MEMORY.is_dir() else set()


def open_segments(pids: Iterable[int]) -> set[str]:
    """Names in /dev/shm that the processes have mapped or open.

    Compared by inode: sem_open maps a semaphore under a temporary name that is gone at once.
    """
    inodes: set[int] = set()
    for pid in pids:
        inodes |= _mapped_inodes(pid) | _open_inodes(pid)
    if not inodes:
        return set()
    return {entry.name for entry in os.scandir(SHARED_MEMORY) if entry.inode() in inodes}


def _mapped_inodes(pid: int) -> set[int]:
    prefix = os.fsencode(SHARED_MEMORY) + b"/"
    columns = (line.split(maxsplit=5) for line in _read(pid, "maps").splitlines())
    return {int(c[4]) for c in columns if len(c) == 6 and c[5].startswith(prefix)}


def _open_inodes(pid: int) -> set[int]:
    inodes = set()
    try:
        for entry in os.scandir(f"/proc/{pid}/fd"):
            if os.readlink(entry.path).startswith(f"{SHARED_MEMORY}/"):
                inodes.add(os.stat(entry.path).st_ino)
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return inodes  # the process or the descriptor is gone, or not ours to look at
    return inodes


def _unlink_segments(names: set[str]) -> None:
    in_use = open_segments(_living_processes())
    for name in names & _segment_names():
        if name not in in_use:
            (SHARED_MEMORY / name).unlink(missing_ok=True)


def _signal(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def _collect(pid: int) -> None:
    """Wait for a killed child, so that no zombie is left; nothing when it is not our child."""
    try:
        os.waitpid(pid, 0)
    except ChildProcessError:
        return


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # only the owner's death ends it
    os.closerange(3, 1024)  # inherited pipes would keep their readers waiting
    watch(sys.argv[1], int(sys.argv[2]))
