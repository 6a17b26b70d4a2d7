"""The fleet of engines that rank 0 drives.

    requests --spread, or handed out as engines have room--> engine 0 .. N-1 (in parallel)
             --> completions in the requests' order

Every wait has a time-out that names what was waited for, and ends at once when an engine dies.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

from gpg_megatron.config.sections import RolloutConfig
from gpg_megatron.rollout.engine import GIB, Engine, EngineSpec, PauseMode, SleepLevel
from gpg_megatron.rollout.failures import EngineDied, EngineError, with_log
from gpg_megatron.rollout.ray_session import open_ray
from gpg_megatron.rollout.sampling import (
    Sampled,
    SamplingRequest,
    largest_first,
    spread,
    to_completion,
)
from gpg_megatron.types import Completion, EnginePart

PLACEMENT_TIMEOUT_S = 120.0
CONTROL_TIMEOUT_S = 120.0
SHUTDOWN_TIMEOUT_S = 8.0
EXIT_GRACE_S = 3.0
MAX_SCRATCH_PATH = 40
GENERATING = "generating a rollout batch"


class Fleet:
    """vLLM engines behind one generate call. Create it with Fleet.start."""

    def __init__(self, config: RolloutConfig, max_model_len: int, logs: Sequence[Path]) -> None:
        self._config = config
        self._max_model_len = max_model_len
        self._logs = logs
        self._actors: list[Any] = []
        self._placing: dict[Any, int] = {}
        self._loading: dict[Any, int] = {}
        self._processes: list[Any] = []
        self._version = 0
        self._open = True

    @classmethod
    def start(
        cls,
        *,
        model_path: str,
        random_weights: bool = False,
        config: RolloutConfig,
        device: Literal["cpu", "cuda"],
        max_model_len: int,
        run_id: str,
        worker_extension: str,
        weight_transfer: str | None,
        scratch_dir: Path,
        log_dir: Path,
        cpu_threads: int | None = None,
        devices: Sequence[str] | None = None,
        give_memory_back: bool = False,
    ) -> Fleet:
        """Open Ray and let the engines begin to start; wait_ready waits for them.

        Call it in a thread that lives as long as the fleet: Ray's daemons end with the thread
        that started them.

        Args:
            model_path: a Hugging Face directory that every engine's host can read.
            random_weights: it has no weights; the first publish brings them.
            max_model_len: longest prompt plus response, in tokens.
            run_id: names the Ray namespace.
            worker_extension: dotted path of a class whose methods call_workers can call.
            weight_transfer: name of the weight-transfer engine that its module registers; None:
                the weights stay as they are.
            scratch_dir: for sockets and temporary files of Ray and vLLM; at most 40 characters,
                since Unix sockets lie 62 characters below it. The caller removes it.
            log_dir: where engine_<i>.log are written.
            cpu_threads: of each worker, on CPU; None: this host's cores shared among them.
            devices: GPUs of this host that a private Ray may give to engines, as
                CUDA_VISIBLE_DEVICES spells them; None: all that are visible.
            give_memory_back: sleep and wake will be called; a GPU's workers have to know.

        Raises:
            UserError: Ray has no place for the engines, or does not answer.
        """
        tp, count = config.tensor_model_parallel_size, config.num_engines
        assert len(str(scratch_dir)) <= MAX_SCRATCH_PATH, f"{scratch_dir}: too long for sockets"
        spec = EngineSpec(
            model_path=model_path,
            random_weights=random_weights,
            device=device,
            dtype="float32" if config.dtype == "fp32" else "bfloat16",
            tensor_parallel_size=tp,
            max_model_len=max_model_len,
            max_num_seqs=config.max_num_seqs,
            gpu_memory_utilization=config.gpu_memory_utilization,
            kv_cache_bytes=int(config.kv_cache_gb * GIB),
            enforce_eager=config.enforce_eager,
            gives_memory_back=give_memory_back,
            worker_extension=worker_extension,
            weight_transfer=weight_transfer,
            cpu_threads=cpu_threads or max(1, len(os.sched_getaffinity(0)) // (tp * count)),
            scratch=str(scratch_dir),
        )
        logs = [log_dir.absolute() / f"engine_{i}.log" for i in range(count)]
        fleet = cls(config, max_model_len, logs)
        with ExitStack() as undo:
            undo.callback(fleet.close)
            gpus = tp if device == "cuda" else 0
            open_ray(
                config,
                run_id=run_id,
                scratch_dir=scratch_dir,
                gpus_per_engine=gpus,
                devices=devices,
            )
            fleet._submit(spec, gpus)
            undo.pop_all()
        return fleet

    def _submit(self, spec: EngineSpec, gpus: int) -> None:
        import ray

        actor_class = ray.remote(num_cpus=1, num_gpus=gpus, max_restarts=0)(Engine)
        self._actors = [actor_class.remote(spec, str(log)) for log in self._logs]
        self._placing = {actor.placed.remote(): i for i, actor in enumerate(self._actors)}
        self._loading = {actor.start.remote(): i for i, actor in enumerate(self._actors)}

    def wait_ready(self) -> None:
        """Return when every engine has loaded its model.

        Raises:
            EngineDied, EngineError, TimeoutError: an engine did not start; the last lines of
                its log are in the message.
        """
        limit = self._config.startup_timeout_s
        hosts = self._gather(self._placing, min(PLACEMENT_TIMEOUT_S, limit), "placement by Ray")
        self._gather(self._loading, limit, "loading the model into vLLM")
        self._processes = self._local_processes([hosts[i] for i in range(len(self._actors))])

    def _local_processes(self, hosts: Sequence[str]) -> list[Any]:
        import psutil

        pids = self._all(lambda actor: actor.pids.remote(), CONTROL_TIMEOUT_S, "listing processes")
        here = os.uname().nodename
        local = [part for host, part in zip(hosts, pids, strict=True) if host == here]
        return [psutil.Process(pid) for part in local for pid in part if psutil.pid_exists(pid)]

    def generate(self, requests: Sequence[SamplingRequest]) -> list[Completion]:
        """All samples of all requests, in the requests' order, then by index.

        Raises:
            EngineDied, EngineError, TimeoutError
        """
        for r in requests:
            length = len(r.prompt.token_ids) + r.max_tokens
            assert length <= self._max_model_len, f"prompt {r.prompt.id}: {length} tokens"
        fits = sum(r.n for r in requests) <= self._config.max_num_seqs * len(self._actors)
        by_request = self._spread(requests) if fits else self._hand_out(requests)
        return [
            to_completion(request, index, sampled)
            for k, request in enumerate(requests)
            for index, sampled in enumerate(by_request[k])
        ]

    def _spread(self, requests: Sequence[SamplingRequest]) -> dict[int, list[Sampled]]:
        """Everything at once, since the engines can run all of it at once."""
        parts = spread(requests, len(self._actors))
        refs = {
            self._actors[i].generate.remote([requests[k] for k in part], self._version): i
            for i, part in enumerate(parts)
            if part
        }
        answers = self._gather(refs, self._config.generate_timeout_s, GENERATING)
        return {
            k: samples
            for i, part in enumerate(parts)
            if part
            for k, samples in zip(part, answers[i], strict=True)
        }

    def _hand_out(self, requests: Sequence[SamplingRequest]) -> dict[int, list[Sampled]]:
        """The largest first, each to the engine with most room; none idles while others have a
        queue of their own."""
        limit_s = self._config.generate_timeout_s
        deadline = time.monotonic() + limit_s
        waiting = deque(largest_first(requests))
        room = [self._config.max_num_seqs] * len(self._actors)
        running: dict[Any, tuple[int, int]] = {}
        answers: dict[int, list[Sampled]] = {}
        while waiting or running:
            while waiting and max(room) > 0:
                k, engine = waiting.popleft(), room.index(max(room))
                ref = self._actors[engine].generate.remote([requests[k]], self._version)
                running[ref] = engine, k
                room[engine] -= requests[k].n
            engines = {ref: engine for ref, (engine, _) in running.items()}
            for ref in self._ready(engines, deadline, limit_s, GENERATING):
                engine, k = running.pop(ref)
                (answers[k],) = self._get(ref, engine, GENERATING)
                room[engine] += requests[k].n
        return answers

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
        assert len(args_per_engine) == len(self._actors), "one tuple of arguments per engine"
        refs = {
            actor.call_workers.remote(method, args): i
            for i, (actor, args) in enumerate(zip(self._actors, args_per_engine, strict=True))
        }
        answers = self._gather(refs, timeout_s, f"calling {method} on the workers")
        return [answers[i] for i in range(len(self._actors))]

    @property
    def num_engines(self) -> int:
        return len(self._actors)

    @property
    def version(self) -> int:
        """The weight version that generate stamps now."""
        return self._version

    def connect(self, payload: bytes, *, timeout_s: float) -> None:
        """Give every engine its end of the bridge, and its number."""
        import ray

        shared = ray.put(payload)
        refs = {actor.connect.remote(shared, i): i for i, actor in enumerate(self._actors)}
        self._gather(refs, timeout_s, "connecting to the policy ranks")

    def begin_update(self, mode: PauseMode = "wait") -> None:
        """Stop generation on every engine; it is refused until commit."""
        limit = self._config.generate_timeout_s
        self._all(lambda actor: actor.begin_update.remote(mode), limit, "pausing generation")

    def receive(self, payload: bytes) -> PendingCall:
        """Let every engine receive weights; returns at once."""
        refs = {actor.receive.remote(payload): i for i, actor in enumerate(self._actors)}
        return PendingCall(self, refs, "receiving weights")

    def commit(self, version: int) -> None:
        """Stamp later samples with this version and go on generating."""
        self._all(lambda a: a.commit.remote(version), CONTROL_TIMEOUT_S, "committing the weights")
        self._version = version

    def sleep(self, level: SleepLevel) -> None:
        """Every engine gives its memory back; level 1 keeps the weights in host memory, level 2
        drops them."""
        what = "putting the engines to sleep"
        self._all(lambda a: a.sleep.remote(level), self._config.generate_timeout_s, what)

    def wake(self, parts: Sequence[EnginePart]) -> None:
        """Every engine takes the memory of these parts again."""
        what = f"waking {' and '.join(parts)}"
        self._all(lambda actor: actor.wake.remote(list(parts)), CONTROL_TIMEOUT_S, what)

    def pids(self) -> list[int]:
        """Living processes of the engines on this host: actors, cores, workers."""
        return [process.pid for process in self._processes if process.is_running()]

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

    def _all(self, call: Callable[[Any], Any], timeout_s: float, what: str) -> list[Any]:
        refs = {call(actor): i for i, actor in enumerate(self._actors)}
        answers = self._gather(refs, timeout_s, what)
        return [answers[i] for i in range(len(self._actors))]

    def _gather(self, refs: dict[Any, int], timeout_s: float, what: str) -> dict[int, Any]:
        """{engine: result}; the first failure of any engine raises at once."""
        deadline = time.monotonic() + timeout_s
        pending, answers = dict(refs), {}
        while pending:
            for ref in self._ready(pending, deadline, timeout_s, what):
                engine = pending.pop(ref)
                answers[engine] = self._get(ref, engine, what)
        return answers

    def _ready(
        self, pending: Mapping[Any, int], deadline: float, timeout_s: float, what: str
    ) -> list[Any]:
        """At least one of the calls, which are of the engines named; raises TimeoutError."""
        import ray

        left = max(0.0, deadline - time.monotonic())
        ready, _ = ray.wait(list(pending), num_returns=1, timeout=left)
        if not ready:
            late = sorted(set(pending.values()))
            message = f"{what}: no answer from engine {late[0]} within {timeout_s:g} s"
            message += f" (waiting for engines {late})" if len(late) > 1 else ""
            raise TimeoutError(with_log(message, self._logs[late[0]]))
        return ready

    def _get(self, ref: Any, engine: int, what: str) -> Any:
        import ray
        from ray.exceptions import RayActorError, RayTaskError

        log = self._logs[engine]
        try:
            return ray.get(ref, timeout=CONTROL_TIMEOUT_S)
        except EngineDied:
            message = f"engine {engine} died while {what}: its core process is gone"
            raise EngineDied(with_log(message, log)) from None
        except RayActorError:
            message = f"engine {engine} died while {what}: its actor process is gone"
            raise EngineDied(with_log(message, log)) from None
        except RayTaskError as error:
            reason = str(error.cause) or repr(error.cause)
            message = f"engine {engine} failed while {what}: {reason}"
            raise EngineError(with_log(message, log)) from error


class PendingCall:
    """A call to all engines that has been sent and not answered."""

    def __init__(self, fleet: Fleet, refs: dict[Any, int], what: str) -> None:
        self._fleet = fleet
        self._refs = refs
        self._what = what

    def failure(self) -> str | None:
        """Why an engine failed so far; None while none has."""
        import ray

        for ref in ray.wait(list(self._refs), num_returns=len(self._refs), timeout=0)[0]:
            try:
                self._fleet._get(ref, self._refs[ref], self._what)
            except EngineError as error:
                return str(error)
        return None

    def wait(self, timeout_s: float) -> None:
        """Return when all engines have answered.

        Raises:
            EngineDied, EngineError, TimeoutError
        """
        self._fleet._gather(self._refs, timeout_s, self._what)


def _end(processes: Sequence[Any]) -> None:
    """Kill what does not end by itself; resource trackers still unlink what others left."""
    import psutil

    for process in psutil.wait_procs(processes, timeout=EXIT_GRACE_S)[1]:
        process.kill()
