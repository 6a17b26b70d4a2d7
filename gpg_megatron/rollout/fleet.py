"""The fleet of engines that rank 0 drives. Every wait has a time-out (calls.py).

requests --flights.py--> engine 0 .. N-1 (in parallel) --> completions in the requests' order
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from gpg_megatron.rollout.calls import CONTROL_TIMEOUT_S, PendingCalls
from gpg_megatron.rollout.engine import PauseMode, SleepLevel
from gpg_megatron.rollout.failures import EngineDied
from gpg_megatron.rollout.flights import Flights, answer_all
from gpg_megatron.rollout.ray_session import leave_ray, open_ray
from gpg_megatron.rollout.roster import Roster
from gpg_megatron.rollout.sampling import SamplingRequest
from gpg_megatron.rollout.spec import EngineSpec
from gpg_megatron.types import Completion, EnginePart

SHUTDOWN_TIMEOUT_S = 8.0
MAX_SCRATCH_PATH = 40


class Fleet:
    """vLLM engines behind one generate call. Create it with Fleet.start."""

    def __init__(self, spec: EngineSpec, log_dir: Path) -> None:
        self._spec = spec
        self._roster = Roster(spec, log_dir)
        self._renewed = 0
        """The roster's changes that the bridge knows of."""
        self._version = 0
        self._updates = False
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
            fleet._roster.begin()
            undo.pop_all()
        return fleet

    def wait_ready(self) -> None:
        """Return when every engine has loaded its model.

        Raises:
            EngineDied, EngineError, TimeoutError: an engine did not start; the last lines of
                its log are in the message.
        """
        self._roster.wait_ready()
        self._renewed = self._roster.changes

    def generate(self, requests: Sequence[SamplingRequest]) -> list[Completion]:
        """All samples of all requests, in the requests' order, then by index. What engines that
        are lost owe is asked of others; with too few of them it waits for a publish.

        Raises:
            EngineDied, EngineError, TimeoutError
        """
        answers = answer_all(self.flights(), requests, self.room)
        return [completion for group in answers for completion in group]

    def flights(self) -> Flights:
        """For requests that are started one by one, and answered as they end."""
        return Flights(self, timeout_s=self._spec.rollout.generate_timeout_s)

    @property
    def version(self) -> int | None:
        """Of the weights, as it was last committed; None: they are being changed."""
        return None if self._updates else self._version

    def ready(self) -> list[int]:
        """Ids of the engines that may be asked; none while they are too few. Raises EngineError:
        too many were lost."""
        return self._roster.ready()

    def ask(self, engine: int, request: SamplingRequest, name: str) -> Any:
        """Send a request to an engine under a name; Ray's reference to its samples."""
        actor = self._roster.actor(engine)
        return actor.answer.remote(self._fitting(request), self._version, name)

    def stop(self, engine: int, name: str) -> None:
        """End the request of that name."""
        self._roster.actor(engine).stop.remote(name)

    def generating(self, sent: Mapping[Any, int]) -> PendingCalls:
        """Requests that were sent."""
        return self._roster.pending("generating a rollout batch", sent)

    def _fitting(self, request: SamplingRequest) -> SamplingRequest:
        """Engines read token ids; what else a row holds may not exist on their hosts."""
        length = len(request.prompt.token_ids) + request.params.max_tokens
        assert length <= self._spec.max_model_len, f"prompt {request.prompt.id}: {length} tokens"
        return replace(request, prompt=replace(request.prompt, extra_info={}))

    @property
    def room(self) -> int:
        """Samples that all engines together decode at once."""
        return self._spec.rollout.num_engines * self._spec.max_num_seqs

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
        args = iter(args_per_engine)
        return self._send(
            f"calling {method} on the workers",
            lambda actor: actor.call_workers.remote(method, next(args)),
        ).answers(timeout_s)

    @property
    def num_engines(self) -> int:
        """Those that hear every call."""
        return len(self._roster.members)

    @property
    def waits_for_weights(self) -> bool:
        """Too few engines may generate, and enough others have loaded: a publish mends it."""
        return self._roster.waits_for_weights

    def renew(self) -> int:
        """Before a publish: take in engines that have loaded in place of lost ones, and wait for
        them while too few are left.

        Returns:
            a number that differs when the engines are others than before.

        Raises:
            EngineError: too many were lost.
        """
        self._renewed = self._roster.renew()
        return self._renewed

    def connect(self, payload: bytes, *, timeout_s: float) -> None:
        """Give every engine its end of the bridge, and its place among them."""
        import ray

        shared, places = ray.put(payload), itertools.count()
        self._send(
            "connecting to the policy ranks",
            lambda actor: actor.connect.remote(shared, next(places)),
        ).wait(timeout_s)

    def begin_update(self, mode: PauseMode | None = None) -> None:
        """Stop generation on every engine; it is refused until commit. mode: None: that of
        rollout.update."""
        r = self._spec.rollout
        mode = mode or ("wait" if r.update == "drain" else r.in_flight_cache)
        limit = r.generate_timeout_s
        self._updates = True
        self._all("pausing generation", lambda actor: actor.begin_update.remote(mode), limit)

    def receive(self, payload: bytes) -> PendingCalls:
        """Let every engine receive weights; returns at once."""
        return self._send("receiving weights", lambda actor: actor.receive.remote(payload))

    def commit(self, version: int) -> None:
        """Stamp later samples with this version and go on generating."""
        self._all("committing the weights", lambda actor: actor.commit.remote(version))
        self._version, self._updates = version, False
        self._roster.are_ready()

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
        actors = self._roster.close()
        if ray.is_initialized():
            # Not an error here: an engine that is dead already has nothing to shut down.
            if asked := [actor.shutdown.remote() for actor in actors]:
                ray.wait(asked, num_returns=len(asked), timeout=SHUTDOWN_TIMEOUT_S)
            for actor in actors:
                ray.kill(actor)
            leave_ray(SHUTDOWN_TIMEOUT_S)
        self._roster.end_processes()

    def _all(
        self, what: str, call: Callable[[Any], Any], timeout_s: float = CONTROL_TIMEOUT_S
    ) -> list[Any]:
        """[engine] answers."""
        calls = self._send(what, call)
        try:
            return calls.answers(timeout_s)
        except EngineDied:
            calls.settle(CONTROL_TIMEOUT_S)  # before the others are told something else
            raise

    def _send(self, what: str, call: Callable[[Any], Any]) -> PendingCalls:
        """Raises EngineDied: the engines are not those that the last renew has seen."""
        refs = {call(self._roster.actor(i)): i for i in self._roster.members}
        if self._renewed != self._roster.changes:
            raise EngineDied(f"an engine was lost before {what}")
        return self._roster.pending(what, refs)
