"""Where the launchers of a run's hosts meet: they start together, and one's end is all their end.

host 0: opens the store ---.
host k: joins it ----------+--> wait_for_all --> watch ... --> leave
                                each beats once a second, and reads what the others say
"""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from datetime import timedelta

from gpg_megatron.errors import EXIT_STOPPED, UserError

JOIN_TIMEOUT_S = 900.0
STORE_TIMEOUT_S = 60.0
SILENT_AFTER_S = 30.0
LEAVE_TIMEOUT_S = 20.0
COMPARE_S = 5.0
"""How long a host that failed waits for others, one of which may know the cause."""
BEAT_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Hosts:
    """The hosts of a run and this one's place among them."""

    count: int = 1
    rank: int = 0
    """Of this host; policy rank 0 is on host 0."""
    ranks_here: int | None = None
    """Policy ranks of this host, 0 for engines only; None: as placement/hosts.py shares them."""
    address: str = "localhost"
    """Of host 0."""
    port: int = 29500
    """On host 0; for the launchers and the policy ranks."""
    ray_port: int = 6379
    """On host 0."""

    def ranks_of_a_host(self, world_size: int) -> int:
        """Policy ranks of this host, before the hosts have shared them: as many as it is told, or
        an equal part."""
        even = -(-world_size // self.count)
        return even if self.ranks_here is None else self.ranks_here


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why a host's part of a run ended early."""

    text: str
    """One line, without "error:"."""
    exit_code: int
    is_cause: bool
    """Whether it began there, as far as can be told: a process was killed, an input was bad."""
    is_said: bool = False
    """Whether that host has printed it already."""
    is_host: bool = False
    """Whether the launcher of a host is gone."""
    host: int = 0

    def line(self, here: int) -> str:
        """What host `here` prints of it; empty: nothing."""
        if self.is_said and (self.host == here or self.exit_code == EXIT_STOPPED):
            return ""
        if self.host != here:
            return f"error: host {self.host}: {self.text}"
        return self.text if self.exit_code > 128 else f"error: {self.text}"


def cause_of(failures: Iterable[Failure], here: int) -> Failure | None:
    """What host `here` gives as the reason for the end of the run: a cause rather than what
    followed from it, its own rather than another's."""
    return min(failures, key=lambda f: (not f.is_cause, f.host != here, f.host), default=None)


class Meeting:
    """This host's end of the meeting. Its methods are called by the main thread alone."""

    def __init__(
        self, hosts: Hosts, join_timeout_s: float = JOIN_TIMEOUT_S, *, attempt: int = 0
    ) -> None:
        """Join; host 0 opens the store that all of it goes through.

        Args:
            attempt: restarts so far, the same on all hosts.

        Raises:
            UserError: the port cannot be opened, or host 0 does not answer.
        """
        from torch.distributed import DistError, PrefixStore, TCPStore

        self._hosts = hosts
        self._limit_s = join_timeout_s
        self._others = [k for k in range(hosts.count) if k != hosts.rank]
        self._stop = threading.Event()
        self._watcher: threading.Thread | None = None
        self._reason: Failure | None = None
        if hosts.rank:
            self._wait_for_port()
        try:
            store = TCPStore(
                hosts.address,
                hosts.port,
                is_master=hosts.rank == 0,
                timeout=timedelta(seconds=STORE_TIMEOUT_S),
                wait_for_workers=False,
                # The policy ranks' rendezvous opens the same port in this process.
                multi_tenant=True,
            )
        except DistError as error:
            where = f"{hosts.address}:{hosts.port}"
            raise UserError(f"cannot use {where}: {str(error).splitlines()[0]}") from None
        self._store = PrefixStore(f"hosts/{attempt}", store)

    def _wait_for_port(self) -> None:
        """torch would wait too, and answer no signal meanwhile."""
        where = (self._hosts.address, self._hosts.port)
        deadline = time.monotonic() + self._limit_s
        while True:
            try:
                socket.create_connection(where, timeout=BEAT_S).close()
                return
            except OSError as error:
                if time.monotonic() > deadline:
                    raise UserError(
                        f"waited {self._limit_s:g} s for host 0 at {where[0]}:{where[1]}: {error}"
                    ) from None
            time.sleep(BEAT_S / 2)

    def wait_for_all(self, what: str) -> None:
        """Return when every host has called it with the same text.

        Raises:
            UserError: a host did not come; it is named.
        """
        self._store.set(f"{what}/{self._hosts.rank}", "1")

        def missing() -> list[int]:
            return [k for k in self._others if not self._store.check([f"{what}/{k}"])]

        if not _until(lambda: not missing(), self._limit_s):
            raise UserError(f"waited {self._limit_s:g} s for hosts {missing()}: {what}")

    def tell(self, what: str, value: str) -> None:
        """One host says something to all."""
        self._store.set(what, value)

    def hear(self, what: str) -> str:
        """What a host told. Raises UserError when none does."""
        if not _until(lambda: self._store.check([what]), self._limit_s):
            raise UserError(f"waited {self._limit_s:g} s to hear {what}")
        return str(self._store.get(what).decode())

    def wait_for_the_end(self) -> None:
        """Return when host 0 has left: what a host without ranks does meanwhile is Ray's."""
        while not self._store.check(["left/0"]):
            time.sleep(BEAT_S / 2)

    def watch(self) -> None:
        """From now on SIGHUP comes to this process when another host fails or is silent: it ends
        the ranks at once, where other signals ask them to leave in order."""
        self._watcher = threading.Thread(target=self._watch, name="hosts", daemon=True)
        self._watcher.start()

    def end(self, failure: Failure | None) -> Failure | None:
        """Leave, with what ended this host's part; returns what ended the run."""
        self._stop.set()
        if self._watcher is not None:
            self._watcher.join()
        known = [] if self._reason is None else [self._reason]
        # The watcher's own signal is no news.
        if failure is not None and not (known and failure.exit_code == 128 + signal.SIGHUP):
            known.append(failure)
        try:
            known += self._leave(known)
        except RuntimeError:  # torch's, when the store is gone
            known.append(_lost(0, "is gone"))
        return cause_of(known, self._hosts.rank)

    def _leave(self, known: list[Failure]) -> list[Failure]:
        """What the other hosts say; those that failed know the cause within moments."""
        rank = self._hosts.rank
        for failure in known:
            if failure.host == rank:
                self._store.set(f"failed/{rank}", json.dumps(asdict(failure)))
        found: list[Failure] = []
        if known and not any(failure.is_cause for failure in known):
            beats = self._beats()
            _until(lambda: any(f.is_cause for f in self._failures()), COMPARE_S)
            still = [k for k, beat in self._beats().items() if beat == beats.get(k)]
            found += [_lost(k, "does not answer any more") for k in still]
        lost = {f.host for f in (*known, *found)} - {rank}
        found += (told := self._failures())
        lost -= {f.host for f in told}
        self._store.set(f"left/{rank}", "1")
        if rank == 0:  # the store ends with this launcher
            keys = [f"left/{k}" for k in self._others if k not in lost]
            _until(lambda: self._store.check(keys), LEAVE_TIMEOUT_S)
        return found

    def _watch(self) -> None:
        """Beat, and see whether the others do; the time is this host's own."""
        seen: dict[int, tuple[str, float]] = {}
        number = 0
        while not self._stop.wait(BEAT_S):
            number += 1
            try:
                self._store.set(f"beat/{self._hosts.rank}", str(number))
                self._reason = cause_of(self._failures(), self._hosts.rank) or self._silent(seen)
            except RuntimeError:  # torch's, when the store is gone
                self._reason = _lost(0, "is gone")
            if self._reason is not None:
                os.kill(os.getpid(), signal.SIGHUP)
                return

    def _silent(self, seen: dict[int, tuple[str, float]]) -> Failure | None:
        now = time.monotonic()
        for k, beat in self._beats().items():
            if k not in seen or seen[k][0] != beat:
                seen[k] = (beat, now)
            elif now - seen[k][1] > SILENT_AFTER_S:
                return _lost(k, f"has been silent for {SILENT_AFTER_S:g} s")
        return None

    def _beats(self) -> dict[int, str]:
        """The last beat of each other host that has neither left nor failed."""
        found = {}
        for k in self._others:
            if not any(self._store.check([f"{what}/{k}"]) for what in ("left", "failed")):
                beat = f"beat/{k}"
                found[k] = self._store.get(beat).decode() if self._store.check([beat]) else ""
        return found

    def _failures(self) -> list[Failure]:
        """Of the other hosts."""
        keys = [f"failed/{k}" for k in self._others]
        said = (json.loads(self._store.get(key)) for key in keys if self._store.check([key]))
        return [Failure(**failure) for failure in said]


def _until(condition: Callable[[], bool], limit_s: float) -> bool:
    """Whether it became true in time."""
    deadline = time.monotonic() + limit_s
    while not (true := condition()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return true


def _lost(host: int, how: str) -> Failure:
    text = f"its launcher {how}"
    return Failure(text=text, exit_code=1, is_cause=True, is_host=True, host=host)
