"""The faults of benchmarks.chaos, and the demo that they strike."""

from __future__ import annotations

import ctypes
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from gpg_megatron.checkpoint.store import list_saved, remove
from gpg_megatron.host.reaper import RUN_ID_VARIABLE, SHARED_MEMORY, open_segments
from gpg_megatron.observe.rundir import METRICS

STALL_S, SILENT_S, VERDICT_S = 60, 30, 5
"""What an engine, a rank and a scorer may take to answer; what is stopped is noticed no earlier."""
RAY_S = 70
"""After which Ray, as it comes, holds a node for dead that does not answer."""
OVERRIDES = (
    "policy.tensor_model_parallel_size=1",
    "policy.pipeline_model_parallel_size=1",
    f"policy.timeout_s={SILENT_S}",
    f"rollout.stall_timeout_s={STALL_S}",
    "rollout.max_losses_per_hour=100000",
    f"reward.timeout_s={VERDICT_S}",
    "reward.retries=5",
    "reward.retry_wait_s=0",
    "trainer.train_batch_size=8",
    "trainer.total_training_steps=100000",
    "trainer.test_freq=0",
    "trainer.max_restarts=100000",
    "trainer.max_restarts_per_hour=100000",
    "validation.before_train=false",
    "checkpoint.save_freq=2",
    "checkpoint.keep_last=3",
    "logging.tensorboard=false",
)
ALONE: tuple[str, ...] = ()
TWO_RANKS = ("policy.data_parallel_size=2", "bridge.transport=gloo")
"""For what one rank notices of another, and for connections that can be cut."""
READY = "policy and engines ready in"
NOTHING_LEFT_S = 20.0
_GETFD = 438


class Demo:
    """The run, through all of its launchers."""

    def __init__(self, output: Path, overrides: list[str]) -> None:
        self.output = output
        self.checkpoints = output / "checkpoints"
        self._log = output.with_suffix(".log")
        self._command = [sys.executable, "-m", "gpg_megatron.start.train"]
        self._command += ["--config", "configs/demo_cpu.yaml", *OVERRIDES, *overrides]
        self._command += [f"trainer.output_dir={output}"]
        self._run_ids: set[str] = set()
        self._segments: set[str] = set()
        self.left_behind: list[str] = []
        """Processes and segments that outlived a launcher."""
        self._log.parent.mkdir(parents=True, exist_ok=True)
        self._log.touch()

    def start(self) -> None:
        with self._log.open("a") as file:
            # Not killed by what is meant for this process's terminal.
            self.process = subprocess.Popen(
                self._command, stdout=file, stderr=file, start_new_session=True
            )

    def steps(self) -> list[int]:
        """As they were reported, repeated ones too."""
        path = self.output / METRICS
        found = []
        for line in path.read_text().splitlines() if path.exists() else []:
            with suppress(json.JSONDecodeError):  # half written
                found.append(int(json.loads(line)["step"]))
        return found

    def printed(self) -> str:
        return self._log.read_text(errors="replace")

    def find(self, kind: str) -> list[psutil.Process]:
        """Processes of a kind; what belongs to the run is remembered."""
        try:
            mine = psutil.Process(self.process.pid)
            below = mine.children(recursive=True)
        except psutil.NoSuchProcess:
            return []
        found = [mine] if kind == "launcher" else []
        for process in below:
            with suppress(psutil.Error):
                if mark := process.environ().get(RUN_ID_VARIABLE):
                    self._run_ids.add(mark)
                is_rank = process.ppid() == mine.pid and "RANK" in process.environ()
                line = f"{process.name()} {' '.join(process.cmdline())}"
                if is_rank if kind == "rank" else kind in line:
                    found.append(process)
        self._segments |= open_segments(process.pid for process in below)
        return found

    def wait_for_steps(self, count: int, limit_s: float) -> None:
        """More rows. Raises TimeoutError: they do not come."""
        wanted, deadline = len(self.steps()) + count, time.monotonic() + limit_s
        while len(self.steps()) < wanted:
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise TimeoutError(f"{count} steps did not come: {self.printed()[-3000:]}")
            self.find("")
            time.sleep(0.5)

    def wait_until_gone(self) -> None:
        """The launcher has ended; what outlives it by more than the reaper takes is remembered."""
        deadline = time.monotonic() + NOTHING_LEFT_S
        while (left := self._left()) and time.monotonic() < deadline:
            time.sleep(0.2)
        self.left_behind += left

    def kill(self) -> None:
        """All of it, lost as it is."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self.wait_until_gone()

    def _left(self) -> list[str]:
        found = [name for name in self._segments if (SHARED_MEMORY / name).exists()]
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get(RUN_ID_VARIABLE) in self._run_ids:
                    found.append(str(process))
        return found


Strike = Callable[[Demo, random.Random], None]


def _nothing(demo: Demo) -> None:
    """To mend."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A row of the table of what may happen."""

    name: str
    strike: Strike
    sign: str = ""
    """A pattern of the line that says it; empty: nothing has to be said."""
    back: str = ""
    """A pattern of the line by which what was struck is there again; empty: the next step is."""
    by: str
    """What recovers it."""
    waits_s: float = 0.0
    """A limit that has to run out first."""
    ends: int | None = None
    """The exit code with which the run may end; it is mended and started again then."""
    mend: Callable[[Demo], None] = field(default=_nothing)
    needs: tuple[str, ...] = ALONE


def _send(kind: str, number: signal.Signals) -> Strike:
    def strike(demo: Demo, draw: random.Random) -> None:
        draw.choice(demo.find(kind)).send_signal(number)

    return strike


def _pause_launcher(demo: Demo, draw: random.Random) -> None:
    """As Ctrl-Z and fg: nobody else has to notice."""
    demo.process.send_signal(signal.SIGSTOP)
    time.sleep(draw.uniform(5.0, 15.0))
    demo.process.send_signal(signal.SIGCONT)


def _fill_disk(demo: Demo, draw: random.Random) -> None:
    """The disk of the checkpoints, which holds nothing else."""
    with suppress(OSError), _ballast(demo).open("wb", buffering=0) as file:
        while file.write(bytes(1 << 16)):
            pass


def _empty_disk(demo: Demo) -> None:
    _ballast(demo).unlink()


def _ballast(demo: Demo) -> Path:
    return demo.checkpoints / "ballast"


def _damage_newest(demo: Demo, draw: random.Random) -> None:
    """One bit of it; then a rank is killed, so that somebody reads it."""
    file = max(_newest(demo).glob("*.distcp"), key=lambda path: path.stat().st_size)
    data = bytearray(file.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    file.write_bytes(data)
    draw.choice(demo.find("rank")).kill()


def _remove_newest(demo: Demo) -> None:
    remove(_newest(demo))


def _newest(demo: Demo) -> Path:
    return [saved.path for saved in list_saved(demo.checkpoints) if saved.complete][-1]


def _cut_bridge(demo: Demo, draw: random.Random) -> None:
    """All connections between one rank and one engine's worker, as a network does that fails."""
    rank, worker = draw.choice(demo.find("rank")), draw.choice(demo.find("VLLM::"))
    theirs = {c.laddr: c.raddr for c in worker.net_connections("tcp") if c.raddr}
    ends = [c.fd for c in rank.net_connections("tcp") if theirs.get(c.raddr) == c.laddr]
    assert ends, "they have no connection"
    process = os.pidfd_open(rank.pid)
    for end in ends:
        fd = ctypes.CDLL(None, use_errno=True).syscall(_GETFD, process, end, 0)
        assert fd >= 0, os.strerror(ctypes.get_errno())
        with socket.socket(fileno=fd) as connection:
            connection.shutdown(socket.SHUT_RDWR)
    os.close(process)


_KILL, _STOP = signal.SIGKILL, signal.SIGSTOP


def _of_engine(name: str, kind: str, number: signal.Signals) -> Fault:
    waits_s = STALL_S if number == _STOP else 0.0
    return Fault(
        name=name,
        strike=_send(kind, number),
        sign="it is replaced",
        back="is there again",
        by="another engine",
        waits_s=waits_s,
    )


def _of_scorer(name: str, number: signal.Signals) -> Fault:
    waits_s = VERDICT_S if number == _STOP else 0.0
    strike = _send("reward.worker", number)
    return Fault(name=name, strike=strike, by="another scorer", waits_s=waits_s)


def _of_ranks(
    name: str, strike: Strike, *, waits_s: float = 0.0, needs: tuple[str, ...] = ALONE
) -> Fault:
    sign = r"^restart \d+ of"
    return Fault(
        name=name, strike=strike, sign=sign, back=READY, by="restart", waits_s=waits_s, needs=needs
    )


FAULTS = (
    _of_engine("engine actor killed", "ray::Engine", _KILL),
    _of_engine("engine actor stopped", "ray::Engine", _STOP),
    _of_engine("engine core killed", "VLLM::", _KILL),
    _of_engine("engine core stopped", "VLLM::", _STOP),
    _of_scorer("scorer killed", _KILL),
    _of_scorer("scorer stopped", _STOP),
    _of_ranks("raylet killed", _send("raylet/raylet", _KILL)),
    _of_ranks("raylet stopped", _send("raylet/raylet", _STOP), waits_s=RAY_S),
    _of_ranks("only rank killed", _send("rank", _KILL)),
    Fault(
        name="launcher killed",
        strike=_send("launcher", _KILL),
        back=READY,
        by="started again",
        ends=-_KILL,
    ),
    Fault(name="launcher stopped", strike=_pause_launcher, by="continued", waits_s=15.0),
    Fault(
        name="full disk while saving",
        strike=_fill_disk,
        sign="^error: cannot write .*No space left on device",
        back=READY,
        by="started again",
        waits_s=15.0,  # for the next save
        ends=2,
        mend=_empty_disk,
    ),
    Fault(
        name="newest checkpoint damaged",
        strike=_damage_newest,
        sign="^error: .* is damaged: its bytes are not those that were saved",
        back=READY,
        by="started again",
        waits_s=60.0,  # for the restart
        ends=2,
        mend=_remove_newest,
    ),
    _of_ranks("rank killed", _send("rank", _KILL), needs=TWO_RANKS),
    _of_ranks("rank stopped", _send("rank", _STOP), waits_s=SILENT_S + 10, needs=TWO_RANKS),
    _of_ranks("bridge sender cut off", _cut_bridge, needs=TWO_RANKS),
)
