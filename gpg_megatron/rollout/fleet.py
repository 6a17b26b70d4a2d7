"""The fleet of engines that rank 0 drives. Every wait has a time-out (calls.py).

requests --flights.py--> engine 0 .. N-1 (in parallel) --> completions in the requests' order
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from gpg_megatron.rollout.calls import CONTROL_TIMEOUT_S, PendingCalls
from gpg_megatron.rollout.engine import Engine, PauseMode, SleepLevel
from gpg_megatron.rollout.flights import Flights, answer_all
from gpg_megatron.rollout.ray_session import open_ray
from gpg_megatron.rollout.sampling import SamplingRequest
from gpg_megatron.rollout.spec import EngineSpec
from gpg_megatron.types import Completion, EnginePart

PLACEMENT_TIMEOUT_S = 300.0
SHUTDOWN_TIMEOUT_S = 8.0
EXIT_GRACE_S = 3.0
MOST_CALLS = 10_000
"""At once to one engine: each group is one, and Ray would let control wait behind 1,000 of them."""
MAX_SCRATCH_PATH = 40


class Fleet:
    """vLLM engines behind one generate call. Create it with Fleet.start."""

    def __init__(self, spec: EngineSpec, log_dir: Path) -> None:
        self._spec = spec
        self._logs = [
            log_dir.absolute() / f"engine_{i}.log" for i in range(spec.rollout.num_engines)
        ]
        self._actors: list[Any] = []
        self._placing = self._loading = self._pending("starting", {})
        self._processes: list[Any] = []
        self._version = 0
        self._open = True

    @classmethod
    def start(
        cls, spec: EngineSpec, *, run_id: str, log_dir: Path, devices: Sequence[str] | None = None
    ) -> Fleet:
        """Open Ray and let the engines begin to start; wait_ready waits for them.

        Call it in a thread that lives as long as the fleet: Ray's daemons end with the thread
        that started them.

        Args:
            run_id: names the Ray namespace.
            log_dir: where engine_<i>.log are written.
            devices: GPUs of this host that a private Ray may give to engines, as
                CUDA_VISIBLE_DEVICES spells them; None: all that are visible.

        Raises:
            UserError: Ray has no place for the engines, or does not answer.
        """
        too_long = f"{spec.scratch}: too long for sockets"
        assert len(str(spec.scratch)) <= MAX_SCRATCH_PATH, too_long
        fleet = cls(spec, log_dir)
        with ExitStack() as undo:
            undo.callback(fleet.close)
            open_ray(
                spec.rollout,
                run_id=run_id,
                scratch_dir=spec.scratch,
                gpus_per_engine=spec.gpus,
                devices=devices,
            )
            fleet._submit()
            undo.pop_all()
        return fleet

    def _submit(self) -> None:
        import ray

        gpus = self._spec.gpus
        actor_class: Any = ray.remote(num_cpus=1, num_gpus=gpus, max_restarts=0)(Engine)
        actor_class = actor_class.options(max_concurrency=MOST_CALLS)
        self._actors = [actor_class.remote(self._spec, str(log)) for log in self._logs]
        self._placing = self._send("placement by Ray", lambda actor: actor.placed.remote())
        self._loading = self._send(
            "loading the model into vLLM", lambda actor: actor.start.remote()
        )

    def wait_ready(self) -> None:
        """Return when every engine has loaded its model.

        Raises:
            EngineDied, EngineError, TimeoutError: an engine did not start; the last lines of
                its log are in the message.
        """
        limit = self._spec.rollout.startup_timeout_s
        hosts = self._placing.answers(min(PLACEMENT_TIMEOUT_S, limit))
        self._loading.answers(limit)
        self._processes = self._local_processes(hosts)

    def _local_processes(self, hosts: Sequence[str]) -> list[Any]:
        import psutil

        pids = self._all("listing processes", lambda actor: actor.pids.remote())
        here = os.uname().nodename
        local = [part for host, part in zip(hosts, pids, strict=True) if host == here]
        return [psutil.Process(pid) for part in local for pid in part if psutil.pid_exists(pid)]

    def generate(self, requests: Sequence[SamplingRequest]) -> list[Completion]:
        """All samples of all requests, in the requests' order, then by index.

        Raises:
            EngineDied, EngineError, TimeoutError
        """
        answers = answer_all(self.flights(), requests, self.room)
        return [completion for group in answers for completion in group]

    def flights(self) -> Flights:
        """For requests that are started one by one, and answered as they end."""
        return Flights(
            self._ask,
            lambda engine, name: self._actors[engine].stop.remote(name),
            lambda sent: self._pending("generating a rollout batch", sent),
            num_engines=self.num_engines,
            timeout_s=self._spec.rollout.generate_timeout_s,
        )

    def _ask(self, engine: int, request: SamplingRequest, name: str) -> Any:
        return self._actors[engine].answer.remote(self._fitting(request), self._version, name)

    def _fitting(self, request: SamplingRequest) -> SamplingRequest:
        """Engines read token ids; what else a row holds may not exist on their hosts."""
        length = len(request.prompt.token_ids) + request.params.max_tokens
        assert length <= self._spec.max_model_len, f"prompt {request.prompt.id}: {length} tokens"
        return replace(request, prompt=replace(request.prompt, extra_info={}))

    @property
    def room(self) -> int:
        """Samples that all engines together decode at once."""
        return self.num_engines * self._spec.max_num_seqs

    def call_workers(
        self, method: str, args_per_engine: Sequence[tuple[Any, ...]], *, timeout_s: float
    ) -> list[list[Any]]:
        """Call a method of the worker extension on every worker of every engine, concurrently.

        Arguments and results pass through msgpack: numbers, strings, bytes, lists, dicts and
        tensors arrive, tuples arrive as lists; anything else must be pickled to bytes first.

        Returns:
            [engine][worker rank]

        Raises:
            EngineDied, EngineError, TimeoutError
        """
        refs = {
            actor.call_workers.remote(method, args): i
            for i, (actor, args) in enumerate(zip(self._actors, args_per_engine, strict=True))
        }
        return self._pending(f"calling {method} on the workers", refs).answers(timeout_s)

    @property
    def num_engines(self) -> int:
        return len(self._actors)

    def connect(self, payload: bytes, *, timeout_s: float) -> None:
        """Give every engine its end of the bridge, and its number."""
        import ray

        shared = ray.put(payload)
        refs = {actor.connect.remote(shared, i): i for i, actor in enumerate(self._actors)}
        self._pending("connecting to the policy ranks", refs).wait(timeout_s)

    def begin_update(self, mode: PauseMode | None = None) -> None:
        """Stop generation on every engine; it is refused until commit. mode: None: that of
        rollout.update."""
        r = self._spec.rollout
        mode = mode or ("wait" if r.update == "drain" else r.in_flight_cache)
        limit = r.generate_timeout_s
        self._all("pausing generation", lambda actor: actor.begin_update.remote(mode), limit)

    def receive(self, payload: bytes) -> PendingCalls:
        """Let every engine receive weights; returns at once."""
        return self._send("receiving weights", lambda actor: actor.receive.remote(payload))

    def commit(self, version: int) -> None:
        """Stamp later samples with this version and go on generating."""
        self._all("committing the weights", lambda actor: actor.commit.remote(version))
        self._version = version

    def sleep(self, level: SleepLevel) -> None:
        """Every engine gives its memory back; level 1 keeps the weights in host memory, level 2
        drops them."""
        limit = self._spec.rollout.generate_timeout_s
        self._all("putting the engines to sleep", lambda actor: actor.sleep.remote(level), limit)

    def wake(self, parts: Sequence[EnginePart]) -> None:
        """Every engine takes the memory of these parts again."""
        self._all(f"waking {' and '.join(parts)}", lambda actor: actor.wake.remote(list(parts)))

    def close(self) -> None:
        """End the engines and leave Ray, ending it if it is private. May be called again."""
        import ray

        if not self._open:
            return
        self._open = False
        if ray.is_initialized():
            # Not an error here: an engine that is dead already has nothing to shut down.
            ray.wait(
                [actor.shutdown.remote() for actor in self._actors] or [ray.put(None)],
                num_returns=max(1, len(self._actors)),
                timeout=SHUTDOWN_TIMEOUT_S,
            )
            for actor in self._actors:
                ray.kill(actor)
            ray.shutdown()
        _end(self._processes)

    def _all(
        self, what: str, call: Callable[[Any], Any], timeout_s: float = CONTROL_TIMEOUT_S
    ) -> list[Any]:
        """[engine] answers."""
        return self._send(what, call).answers(timeout_s)

    def _send(self, what: str, call: Callable[[Any], Any]) -> PendingCalls:
        return self._pending(what, {call(actor): i for i, actor in enumerate(self._actors)})

    def _pending(self, what: str, refs: Mapping[Any, int]) -> PendingCalls:
        return PendingCalls(what, self._logs, refs)


def _end(processes: Sequence[Any]) -> None:
    """Kill what does not end by itself; resource trackers still unlink what others left."""
    import psutil

    for process in psutil.wait_procs(processes, timeout=EXIT_GRACE_S)[1]:
        process.kill()
