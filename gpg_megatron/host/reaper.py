"""Ends every process and every shared-memory segment of a run, whatever died first.

    owner (launcher) --start_reaper--> reaper, in a session of its own
        |                                 | every second: which processes and which segments
        |                                 | in /dev/shm belong to the run?
        dies, however ------------------> | SIGTERM, SIGKILL, unlink, remove the scratch folder

A process belongs to a run when its environment carries GPG_RUN_ID=<run id>, or when it
descends from one that does, or from the owner after the reaper started. At a normal end the
owner calls cleanup_run. The reaper runs this file by its path, so that it stays small and does
not depend on how the project was found: of packages only psutil may be imported here. Linux only.
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
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

RUN_ID_VARIABLE = "GPG_RUN_ID"
SCRATCH_VARIABLE = "GPG_SCRATCH"
"""For those of the run's processes that another host commands, as engines there."""
SHARED_MEMORY = Path("/dev/shm")
SAMPLE_INTERVAL_S = 1.0
TERM_GRACE_S = 3.0
KILL_GRACE_S = 3.0
_ENDED = (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
_TRACKER = "from multiprocessing.resource_tracker import main"
_MAX_TEMP_PATH = 23
"""Ray puts Unix sockets 62 characters below the scratch folder; the kernel's limit is 107."""
_SAMPLES_UNTIL_FOREIGN = 3


@dataclass(slots=True)
class Sampler:
    """Remembers what belongs to one run: processes and the segments that they opened."""

    run_id: str
    owner: psutil.Process | None = None
    """Its descendants belong to the run when they started after since."""
    since: float = 0.0
    """Seconds since 1970, as all starts."""
    members: set[tuple[int, float]] = field(default_factory=set)
    """(pid, start): a pair that never comes again."""
    segments: set[str] = field(default_factory=set)
    """File names in /dev/shm."""
    _looked_at: dict[str, int] = field(default_factory=dict)

    def sample(self) -> list[psutil.Process]:
        """Look once; returns the living processes of the run."""
        alive: dict[int, psutil.Process] = {}
        for process in _living_processes():
            if self._belongs(process, alive):
                alive[process.pid] = process
        self.members = {(p.pid, p.create_time()) for p in alive.values()}
        names = _segment_names() - self.segments
        self._looked_at = {n: self._looked_at.get(n, 0) for n in names}
        if any(count < _SAMPLES_UNTIL_FOREIGN for count in self._looked_at.values()):
            self._looked_at = {n: count + 1 for n, count in self._looked_at.items()}
            self.segments |= names & open_segments(alive)
        return list(alive.values())

    def _belongs(self, process: psutil.Process, older: dict[int, psutil.Process]) -> bool:
        """The mark in the environment decides; without one, descent does."""
        started, parent = process.create_time(), process.info["ppid"]
        if (process.pid, started) in self.members:
            return True
        with suppress(psutil.Error, OSError):
            mark = process.environ().get(RUN_ID_VARIABLE)
            if mark is not None:
                return bool(mark == self.run_id)
        if self.owner is not None and parent == self.owner.pid and started > self.since:
            return True
        return parent in older


def new_run_id() -> str:
    """A fresh name for a run: 12 hexadecimal digits."""
    return secrets.token_hex(6)


def scratch_directory(run_id: str) -> Path:
    """Folder for the run's sockets, logs and temporary files; removed at the end of the run."""
    base = tempfile.gettempdir()
    # Ray passes the path on in command lines that it cuts at white space.
    fits = len(base) <= _MAX_TEMP_PATH and not any(map(str.isspace, base))
    return Path(base if fits else "/tmp") / f"gpg-{run_id}"


def start_reaper(run_id: str) -> int:
    """Mark this process's environment as the run's and start its reaper; returns its pid.

    Call it in the process that owns the run, before it starts any other.
    """
    os.environ[RUN_ID_VARIABLE] = run_id
    # setproctitle (Ray, vLLM) writes over /proc/PID/environ unless told to leave it.
    os.environ["SPT_NOENV"] = "1"
    os.environ[SCRATCH_VARIABLE] = str(scratch_directory(run_id))
    scratch_directory(run_id).mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-P", __file__, run_id, str(os.getpid())]
    quiet = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_RDWR, 0) for fd in (0, 1, 2)]
    return os.posix_spawn(command[0], command, os.environ, file_actions=quiet, setsid=True)


def cleanup_run(run_id: str) -> None:
    """End what is left of a run: its processes, segments, scratch folder and its reaper.

    Only the run's owner may call it: it spares itself, its ancestors and its own resource
    tracker, nobody else.

    Raises:
        TimeoutError: a process outlived SIGKILL.
    """
    this = psutil.Process()
    reapers = [p for p in _living_processes() if _words(p)[2:4] == [__file__, run_id]]
    trackers = [p for p in this.children() if _is_tracker(p)]
    spared = [this, *this.parents(), *trackers, *reapers]
    sweep(_load(run_id), spare={p.pid for p in spared})
    for reaper in reapers:
        with suppress(psutil.Error):
            reaper.kill()
            reaper.wait(KILL_GRACE_S)
    shutil.rmtree(scratch_directory(run_id), ignore_errors=True)


def sweep(sampler: Sampler, spare: set[int]) -> None:
    """End the run's processes except spare, then unlink its segments that nobody maps.

    Python's resource trackers are ended last: they unlink the segments of a killed parent.

    Raises:
        TimeoutError: a process outlived SIGKILL.
    """
    for number, trackers, grace_s in (
        (signal.SIGTERM, False, TERM_GRACE_S),
        (signal.SIGKILL, False, KILL_GRACE_S),
        (None, True, TERM_GRACE_S),
        (signal.SIGKILL, True, KILL_GRACE_S),
    ):
        deadline = time.monotonic() + grace_s
        signalled: set[psutil.Process] = set()
        while True:
            alive = {p for p in sampler.sample() if p.pid not in spare}
            left = {p for p in alive if trackers or not _is_tracker(p)}
            if number is not None:
                for process in left - signalled:
                    with suppress(psutil.NoSuchProcess):
                        process.send_signal(number)
                signalled |= left
            if not left or time.monotonic() > deadline:
                break
            time.sleep(0.05)
    for name in (sampler.segments & _segment_names()) - open_segments(psutil.pids()):
        (SHARED_MEMORY / name).unlink(missing_ok=True)
    if left:
        pids = [p.pid for p in left]
        raise TimeoutError(f"processes {pids} of run {sampler.run_id} outlived SIGKILL")


def watch(run_id: str, owner_pid: int) -> None:
    """The reaper's own loop: returns when the owner is dead and the run is swept."""
    sampler = Sampler(run_id, since=psutil.Process().create_time())
    saved: tuple[set[tuple[int, float]], set[str]] = (set(), set())
    with suppress(psutil.NoSuchProcess):
        sampler.owner = owner = psutil.Process(owner_pid)
        while owner.is_running() and owner.status() not in _ENDED:
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
    return Sampler(run_id, members=set(map(tuple, data["members"])), segments=set(data["segments"]))


def _living_processes() -> list[psutil.Process]:
    """No zombies; the oldest first, so that parents come before their children."""
    found = psutil.process_iter(["ppid", "status", "create_time"])
    living = (p for p in found if p.info["status"] not in _ENDED)
    return sorted(living, key=lambda p: (p.create_time(), p.pid))


def _words(process: psutil.Process) -> list[str]:
    """The command line; empty when the process is gone or not ours to look at."""
    with suppress(psutil.Error):
        return list(process.cmdline())
    return []


def _is_tracker(process: psutil.Process) -> bool:
    return any(_TRACKER in word for word in _words(process))


def _segment_names() -> set[str]:
    return set(os.listdir(SHARED_MEMORY)) if SHARED_MEMORY.is_dir() else set()


def open_segments(pids: Iterable[int]) -> set[str]:
    """Names in /dev/shm that the processes have mapped or open.

    Compared by inode: sem_open maps a semaphore under a temporary name that is gone at once.
    """
    inodes: set[int] = set()
    for pid in pids:
        # The process or a descriptor of it may be gone, or not ours to look at.
        with suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            for line in Path(f"/proc/{pid}/maps").read_text(errors="replace").splitlines():
                columns = line.split(maxsplit=5)
                if len(columns) == 6 and columns[5].startswith(f"{SHARED_MEMORY}/"):
                    inodes.add(int(columns[4]))
            for entry in os.scandir(f"/proc/{pid}/fd"):
                if os.readlink(entry.path).startswith(f"{SHARED_MEMORY}/"):
                    inodes.add(os.stat(entry.path).st_ino)
    if not inodes:
        return set()
    return {entry.name for entry in os.scandir(SHARED_MEMORY) if entry.inode() in inodes}


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # only the owner's death ends it
    os.closerange(3, 1024)  # inherited pipes would keep their readers waiting
    watch(sys.argv[1], int(sys.argv[2]))
