"""Where the launchers of a run's hosts meet: all hear what one says, and its end is that of all.

host 0 opens torch's store --.
host k connects to it -------+--> each, twice a second: all that I have said, and a number that
                                  counts; what have the others said, and do their numbers count?
one has failed, or its number stands still --> SIGHUP to every other launcher

A call of the store blocks for ever when the network to host 0 is gone: one thread makes them all,
and another one looks at what was heard.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import timedelta
from typing import Any, Self

from gpg_megatron.errors import UserError
from gpg_megatron.start.world import Failure, cause_of

JOIN_TIMEOUT_S = 900.0
SILENT_AFTER_S = 20.0
LEAVE_TIMEOUT_S = 20.0
BEAT_S = 0.5


class Meeting:
    """This host's end of it, over all restarts of a run; for the main thread."""

    def __init__(
        self, count: int, here: int, where: tuple[str, int], limit_s: float = JOIN_TIMEOUT_S
    ) -> None:
        """
        Args:
            count: of hosts.
            here: this one's number; host 0 opens the store.
            where: its name and port.
            limit_s: how long this host waits for what others are to say.
        """
        self._here, self._where, self._limit_s = here, where, limit_s
        self._attempt = 0
        self._listens = False
        self._said: list[dict[str, Any]] = [{} for _ in range(count)]
        """[host]; this one's own is set by the main thread, the others' by the keeper."""
        self._heard = [math.inf] * count
        """When a host's number changed last; infinite: it has not come."""
        self._lost: Failure | None = None
        self._closed = threading.Event()
        self._keeper = threading.Thread(target=self._keep, name="hosts", daemon=True)
        self._keeper.start()
        threading.Thread(target=self._watch, name="hosts-watch", daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """The store ends with host 0, which leaves last."""
        self._say("left")
        limit_s = LEAVE_TIMEOUT_S if self._lost is None else 4 * BEAT_S
        if self._here == 0:
            _until(lambda: not self._missing("left"), limit_s)
        self._closed.set()
        self._keeper.join(limit_s)

    def begin(self, attempt: int) -> None:
        """After so many restarts, the same on all hosts. From now on SIGHUP comes to this process
        when another host fails or is lost: it ends the ranks at once, where other signals ask them
        to leave in order."""
        self._attempt, self._listens = attempt, True

    def all_say(self, what: str, value: Any = None) -> list[Any]:
        """[host] what each has said, JSON, once all have. Raises UserError: some do not."""
        self._say(what, value)
        if not _until(lambda: not self._missing(what), self._limit_s):
            where, late = "{}:{}".format(*self._where), self._missing(what)
            raise UserError(f"waited {self._limit_s:g} s at {where} for hosts {late}: {what}")
        return [said[self._key(what)] for said in self._said]

    def wait_for_the_end(self) -> None:
        """Of host 0: what a host without ranks does meanwhile is Ray's."""
        _until(lambda: 0 not in self._missing("end"), math.inf)

    def end(self, failure: Failure | None) -> Failure | None:
        """An attempt is over, with what ended this host's part; returns what ended the run. While
        it knows of no cause, it waits for the others, one of which may."""
        self._listens = False
        if failure and failure.exit_code == 128 + signal.SIGHUP and self._failures():
            failure = cause_of(self._failures(), self._here)  # the watcher's signal is no news
        self._say("end", failure and asdict(failure))

        def is_known() -> bool:
            return any(f.is_cause for f in self._failures()) or not self._missing("end")

        _until(is_known, SILENT_AFTER_S + 4 * BEAT_S)
        return cause_of(self._failures(), self._here)

    def _key(self, what: str) -> str:
        return f"{self._attempt}/{what}"

    def _say(self, what: str, value: Any = None) -> None:
        self._said[self._here] = self._said[self._here] | {self._key(what): value}

    def _missing(self, what: str) -> list[int]:
        """The hosts that have not said it."""
        return [k for k, said in enumerate(self._said) if self._key(what) not in said]

    def _failures(self) -> list[Failure]:
        """That are known, of this attempt."""
        ends = [said.get(self._key("end")) for said in self._said]
        return [Failure(**end) for end in ends if end] + ([self._lost] if self._lost else [])

    def _watch(self) -> None:
        while not self._closed.wait(BEAT_S):
            late = time.monotonic() - SILENT_AFTER_S
            silent = [k for k in self._missing("end") if self._heard[k] < late]
            if silent and self._lost is None:
                self._lost = _lost(silent[0], f"has been silent for {SILENT_AFTER_S:g} s")
            if self._listens and self._failures():
                self._listens = False
                os.kill(os.getpid(), signal.SIGHUP)

    def _keep(self) -> None:
        """Say and hear, until this host has left or the store is gone."""
        from torch.distributed import TCPStore

        store, here, wait = None, self._here, timedelta(seconds=2 * self._limit_s)
        others = [k for k in range(len(self._said)) if k != here]
        told: dict[int, bytes] = {}
        try:
            store = TCPStore(*self._where, is_master=not here, timeout=wait, wait_for_workers=False)
            for count in itertools.count():
                last = self._closed.wait(BEAT_S)
                store.set(f"host/{here}", json.dumps(self._said[here] | {"count": count}))
                came = [k for k in others if k in told or store.check([f"host/{k}"])]
                news = store.multi_get([f"host/{k}" for k in came]) if came else []
                for k, new in zip(came, news, strict=True):
                    if new != told.get(k):
                        told[k], self._said[k] = new, json.loads(new)
                        self._heard[k] = time.monotonic()
                if last:
                    return
        except RuntimeError as error:  # torch's
            text = "cannot use {}:{}: {}".format(*self._where, str(error).splitlines()[0])
            unusable = Failure(text=text, exit_code=2, is_cause=True, host=here)
            self._lost = self._lost or (_lost(0, "is gone") if store else unusable)


def _until(condition: Callable[[], bool], limit_s: float) -> bool:
    """Whether it became true in time."""
    deadline = time.monotonic() + limit_s
    while not (true := condition()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return true


def _lost(host: int, how: str) -> Failure:
    text = f"its launcher {how}"
    return Failure(text=text, exit_code=1, is_cause=True, is_host=True, host=host)
