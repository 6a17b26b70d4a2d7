"""The engines of a fleet: which may be asked, which are gone, and what takes their place.

    loading --> loaded --renew--> member --are_ready--> ready --lose--> gone, another one is loading

A member hears every call; one that is ready may generate. Where they are replaced, an engine that
has gone or answers nothing for rollout.stall_timeout_s is ended, and the one that is started in its
place waits for a publish, since it has no weights. Every engine ever started has an id; the
remainder by rollout.num_engines is its number. Several threads ask: the loop, those that wait for
groups, and the one that feels the pulses.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from gpg_megatron.rollout.calls import CONTROL_TIMEOUT_S, PendingCalls
from gpg_megatron.rollout.engine import Engine
from gpg_megatron.rollout.failures import EngineError, with_log
from gpg_megatron.rollout.ray_session import has_ended, raylets
from gpg_megatron.rollout.spec import EngineSpec

PLACEMENT_TIMEOUT_S = 300.0
EXIT_GRACE_S = 3.0
PULSE_S = 1.0
CLOSE_S = 10.0
MOST_CALLS = 10_000
"""At once to one engine: each group is one, and Ray would let control wait behind 1,000 of them."""
_HOUR_S = 3600.0
_LOADING = "loading the model into vLLM"


class Roster:
    """See the file's head. Belongs to a Fleet, which has opened Ray."""

    def __init__(self, spec: EngineSpec, log_dir: Path) -> None:
        self._spec = spec
        self._n = spec.rollout.num_engines
        self._logs = [log_dir.absolute() / f"engine_{i}.log" for i in range(self._n)]
        self._changed = threading.Condition(threading.RLock())
        self._actors: dict[int, Any] = {}
        """Of every id; calls to one that has gone fail."""
        self._placing: dict[Any, int] = {}
        self._loading: dict[int, tuple[Any, float]] = {}
        """Ray's reference to the answer of its start, and since when."""
        self._loaded: list[int] = []
        self._members: list[int] = []
        self._ready: list[int] = []
        self._processes: dict[int, list[Any]] = {}
        """On this host, of those that have loaded and are not gone."""
        self._changes = 0
        self._losses: deque[float] = deque()
        """When, of the last hour."""
        self._failure: EngineError | None = None
        self._replaces = False
        self._raylets: list[Any] = []
        self._closed = threading.Event()
        self._feeler = threading.Thread(target=self._feel_pulses, name="pulses", daemon=True)

    # ---- the beginning and the end ---------------------------------------------------------

    def begin(self) -> None:
        """Let all engines begin to start."""
        self._raylets = raylets()
        self._placing = {self._start(engine): engine for engine in range(self._n)}

    def wait_ready(self) -> None:
        """Return when every engine has loaded its model; from then on they may be replaced.

        Raises:
            EngineDied, EngineError, TimeoutError
        """
        if self._members:
            return
        limit = self._spec.rollout.startup_timeout_s
        self.pending("placement by Ray", self._placing).answers(min(PLACEMENT_TIMEOUT_S, limit))
        refs = {ref: engine for engine, (ref, _) in self._loading.items()}
        started = self.pending(_LOADING, refs).answers(limit)
        for engine, (host, pids) in enumerate(started):
            self._has_loaded(engine, host, pids)
        self.renew()
        self.are_ready()
        if self._spec.replaces_lost:
            self._replaces = True
            self._feeler.start()

    def close(self) -> list[Any]:
        """Nothing is replaced any more, and what still loads is ended; the other actors that may
        answer."""
        import ray

        self._closed.set()
        if self._feeler.is_alive():
            self._feeler.join(CLOSE_S)
        with self._changed:
            self._replaces = False
            for engine in self._loading:
                ray.kill(self._actors[engine])
            is_gone = any(map(has_ended, self._raylets))
            return [] if is_gone else [self._actors[i] for i in (*self._members, *self._loaded)]

    def end_processes(self) -> None:
        """Kill what does not end by itself; resource trackers still unlink what others left."""
        import psutil

        mine = [process for part in self._processes.values() for process in part]
        for process in psutil.wait_procs(mine, timeout=EXIT_GRACE_S)[1]:
            process.kill()

    # ---- asking ----------------------------------------------------------------------------

    @property
    def members(self) -> list[int]:
        """Ids, the oldest first."""
        with self._changed:
            return list(self._members)

    @property
    def changes(self) -> int:
        """How often members came or went."""
        return self._changes

    def actor(self, engine: int) -> Any:
        """Of an id."""
        return self._actors[engine]

    def pending(self, what: str, sent: Mapping[Any, int]) -> PendingCalls:
        """Calls that were sent to engines."""
        return PendingCalls(what, self._logs, sent, self.lose)

    def ready(self) -> list[int]:
        """Ids of the engines that may generate; none while they are fewer than
        rollout.min_engines. Raises EngineError: too many were lost."""
        with self._changed:
            if self._failure is not None:
                raise self._failure
            return list(self._ready) if len(self._ready) >= self._least else []

    @property
    def waits_for_weights(self) -> bool:
        """Too few engines may generate, and enough others have loaded: a publish mends it."""
        with self._changed:
            n_there = len(self._members) + len(self._loaded)
            return len(self._ready) < self._least <= n_there

    def renew(self) -> int:
        """Take in those that have loaded, and wait for them while the members are too few.

        Returns:
            a number that differs when the members are others than before.

        Raises:
            EngineError: too many were lost.
        """
        with self._changed:
            # One that does not load in time is lost, so that this has an end.
            while len(self._members) + len(self._loaded) < self._least:
                if self._failure is not None:
                    raise self._failure
                self._changed.wait()
            self._changes += bool(self._loaded)
            self._members = sorted((*self._members, *self._loaded))
            self._loaded = []
            return self._changes

    def are_ready(self) -> None:
        """All members have the weights."""
        with self._changed:
            for engine in self._members:
                if engine >= self._n and engine not in self._ready:
                    print(f"engine {engine % self._n} is there again", file=sys.stderr, flush=True)
            self._ready = list(self._members)

    @property
    def _least(self) -> int:
        return self._spec.rollout.min_engines

    # ---- losing and replacing ---------------------------------------------------------------

    def lose(self, engine: int, why: str) -> None:
        """An engine has gone, or is to go: end it and start another, where they are replaced.
        Again: nothing happens."""
        import psutil
        import ray

        with self._changed:
            if not self._replaces or engine not in (
                *self._members,
                *self._loaded,
                *self._loading,
            ):
                return
            self._changes += engine in self._members
            self._loading.pop(engine, None)
            for ids in (self._members, self._loaded, self._ready):
                if engine in ids:
                    ids.remove(engine)
            # SIGKILL also ends what is stopped, which would not hear Ray.
            for process in self._processes.pop(engine, ()):
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            ray.kill(self._actors[engine])
            if self._are_too_many():
                self._failure = EngineError(self._last_word(why))
            else:
                first = why.splitlines()[0]
                print(f"warning: {first}; it is replaced", file=sys.stderr, flush=True)
                self._start(engine + self._n)
            self._changed.notify_all()

    def _are_too_many(self) -> bool:
        now = time.monotonic()
        self._losses.append(now)
        while now - self._losses[0] > _HOUR_S:
            self._losses.popleft()
        return len(self._losses) > self._spec.rollout.max_losses_per_hour

    def _last_word(self, why: str) -> str:
        first, *log = why.splitlines()
        key = f"rollout.max_losses_per_hour={self._spec.rollout.max_losses_per_hour}"
        first += f" ({len(self._losses)} engines were lost within an hour, {key})"
        return "\n".join((first, *log))

    def _start(self, engine: int) -> Any:
        """Ray's reference to what says that it has a place."""
        import ray

        actor_class: Any = ray.remote(num_cpus=1, num_gpus=self._spec.gpus, max_restarts=0)(Engine)
        actor_class = actor_class.options(max_concurrency=MOST_CALLS)
        actor = actor_class.remote(self._spec, str(self._logs[engine % self._n]))
        placed = actor.placed.remote()
        self._actors[engine] = actor
        self._loading[engine] = actor.start.remote(), time.monotonic()
        return placed

    def _has_loaded(self, engine: int, host: str, pids: Sequence[int]) -> None:
        import psutil

        here = [pid for pid in pids if host == os.uname().nodename and psutil.pid_exists(pid)]
        with self._changed:
            if self._loading.pop(engine, None) is not None:
                self._processes[engine] = [psutil.Process(pid) for pid in here]
                self._loaded.append(engine)
                self._changed.notify_all()

    # ---- pulses ------------------------------------------------------------------------------

    def _feel_pulses(self) -> None:
        """Once a second: who has died, or is silent for too long, is lost."""
        asked: dict[int, tuple[Any, float]] = {}
        while not self._closed.wait(PULSE_S):
            with self._changed:
                living, loading = [*self._members, *self._loaded], dict(self._loading)
            self._look_at_ray(is_needed=bool(loading))
            for engine, (ref, since) in loading.items():
                self._look_at_start(engine, ref, since)
            asked = {engine: one for engine, one in asked.items() if engine in living}
            for engine in living:
                if engine in asked and self._has_pulse(engine, *asked[engine]):
                    del asked[engine]
                if engine not in asked:
                    asked[engine] = self.actor(engine).pulse.remote(), time.monotonic()

    def _look_at_ray(self, *, is_needed: bool) -> None:
        """With its raylet a private Ray is gone, and its actors follow; one that is stopped is
        only missed where something is started, which would wait for ever."""
        import ray

        killed = any(map(has_ended, self._raylets))
        if not killed and not (is_needed and not any(n["Alive"] for n in ray.nodes())):
            return
        with self._changed:
            self._failure = EngineError("Ray has no node left on which an engine could start")
            self._changed.notify_all()

    def _look_at_start(self, engine: int, ref: Any, since: float) -> None:
        limit, number = self._spec.rollout.startup_timeout_s, engine % self._n
        if self._is_answered(ref):
            try:
                ((host, pids),) = self.pending(_LOADING, {ref: engine}).answers(CONTROL_TIMEOUT_S)
            except EngineError as error:
                self.lose(engine, str(error))  # unless that has happened
            else:
                self._has_loaded(engine, host, pids)
        elif time.monotonic() - since > limit:
            why = f"engine {number} did not start within {limit} s"
            self.lose(engine, with_log(why, self._logs[number]))

    def _has_pulse(self, engine: int, ref: Any, since: float) -> bool:
        """Whether it has answered; who has died or is late is lost."""
        limit, number = self._spec.rollout.stall_timeout_s, engine % self._n
        if self._is_answered(ref):
            with suppress(EngineError):  # it is lost by now
                self.pending("nothing was asked of it", {ref: engine}).answers(PULSE_S)
            return True
        if time.monotonic() - since > limit:
            why = f"engine {number} has answered nothing for {limit} s"
            self.lose(engine, with_log(why, self._logs[number]))
        return False

    @staticmethod
    def _is_answered(ref: Any) -> bool:
        import ray

        return bool(ray.wait([ref], timeout=0)[0])
