"""One vLLM engine inside a Ray actor. Only the actor's process imports vLLM.

    Fleet --Ray--> Engine (actor) --zmq--> EngineCore process [--> worker processes, TP > 1]

The constructor is quick, so that Ray's placement and vLLM's start are two separate waits.
"""

from __future__ import annotations

import asyncio
import os
import pickle
import sys
import tempfile
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from gpg_megatron.rollout import forked
from gpg_megatron.rollout.engine_args import engine_args
from gpg_megatron.rollout.failures import EngineDied
from gpg_megatron.rollout.sampling import (
    Sampled,
    SamplingRequest,
    from_vllm,
    routing_of,
    stream_seed,
)
from gpg_megatron.rollout.spec import EngineSpec
from gpg_megatron.types import EnginePart, Routing

T = TypeVar("T")
SleepLevel = Literal[1, 2]
PauseMode = Literal["wait", "keep", "recompute"]
"""What an update does with running requests: wait for their end; or hold them and go on with them
on the new weights, with the keys and values that they have, or with those computed again."""
# torchrun's variables would make vLLM's workers believe that they are policy ranks.
_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_TORCHRUN_PREFIXES = ("GROUP_", "ROLE_", "TORCHELASTIC_")
# For Megatron's overlap; vLLM's copies and kernels would queue behind each other.
_POLICY_ONLY = ("CUDA_DEVICE_MAX_CONNECTIONS",)
_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
_NO_DEVICES = "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"


def sanitize_environment(spec: EngineSpec) -> None:
    """Make os.environ fit for vLLM; it reads these at import and hands them to its processes."""
    for name in list(os.environ):
        if name in (*_TORCHRUN, *_POLICY_ONLY) or name.startswith(_TORCHRUN_PREFIXES):
            del os.environ[name]
    # An allocator setting for the policy that breaks vLLM's memory pools.
    for name in _ALLOCATOR:
        if "expandable_segments" in os.environ.get(name, ""):
            del os.environ[name]
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    tp, count = spec.rollout.tensor_model_parallel_size, spec.rollout.num_engines
    temporary = Path(os.environ.get("GPG_SCRATCH", spec.scratch)) / "tmp"
    temporary.mkdir(parents=True, exist_ok=True)
    os.environ["TMPDIR"] = str(temporary)
    tempfile.tempdir = None  # Ray has asked for it before
    if spec.device == "cpu":
        # Of each worker: the cores shared among all of them.
        threads = max(1, len(os.sched_getaffinity(0)) // (tp * count))
        os.environ["OMP_NUM_THREADS"] = str(threads)
        # Spinning threads cost a factor of ten when policy ranks share the cores.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        # "auto" leaves a core idle and refuses TP > 1 on a machine with one NUMA node.
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        # On a CPU vLLM 0.32 cannot load what it stores so, and compiles anew at every start; what
        # torch stores by itself is found again.
        os.environ.setdefault("VLLM_USE_AOT_COMPILE", "0")
        if spec.rollout.enforce_eager:
            # vLLM compiles a function of its sampler even then: 10 to 20 s, and a C++ compiler.
            os.environ["TORCH_COMPILE_DISABLE"] = "1"
        if tp == 1:
            # Lets the only worker live inside EngineCore: half the latency, 0.5 GB less.
            os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"


def take_devices() -> None:
    """Inside an actor: the GPUs that Ray has booked for it are those that it sees.

    A user's shell may tell Ray not to say so; then every engine would use the first GPU.
    """
    if _NO_DEVICES in os.environ:
        import ray

        del os.environ[_NO_DEVICES]
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, ray.get_gpu_ids()))


class Engine:
    """The actor's class; Fleet wraps it with ray.remote."""

    def __init__(self, spec: EngineSpec, log: str) -> None:
        self._spec = spec
        Path(log).parent.mkdir(parents=True, exist_ok=True)
        sys.stdout.flush()
        sys.stderr.flush()
        fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(fd, 1)
        os.dup2(fd, 2)
        os.close(fd)
        take_devices()
        sanitize_environment(spec)
        if spec.device == "cpu":
            forked.begin()

    async def placed(self) -> str:
        """Answers as soon as Ray has found a place: the host's name."""
        return os.uname().nodename

    async def start(self) -> tuple[str, list[int]]:
        """Load the model; returns the host's name, and the ids of this process and all below."""
        import psutil

        # Minutes, for a large model: placed is answered meanwhile.
        self._llm = await asyncio.to_thread(self._load)
        tokenizer: Any = self._llm.get_tokenizer()
        added = tokenizer.added_tokens_decoder
        self._special = {x.content: i for i, x in added.items() if x.special}
        self._whole = True
        self._asleep: set[EnginePart] = set()
        await self._alive(self._llm.update_weight_version("0"))
        self._records = self._spec.rollout.router_replay and self._spec.device == "cpu"
        """Whether what vLLM does not say is recorded in its worker."""
        if self._records:
            await self.call_workers("bridge_record_routing", (pickle.dumps(()),))
        this = psutil.Process()
        return os.uname().nodename, [this.pid, *(p.pid for p in this.children(recursive=True))]

    async def pulse(self) -> None:
        """Answers when the core does, which it does between two steps of a batch."""
        await self._alive(self._llm.is_sleeping())

    def _load(self) -> Any:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        if self._spec.device == "cpu":
            forked.fork_what_vllm_starts()
        return AsyncLLM.from_engine_args(AsyncEngineArgs(**engine_args(self._spec)))

    async def answer(self, request: SamplingRequest, version: int, name: str) -> Sampled:
        """The samples of one request; vLLM batches it with the others that run. No two that run
        have the same name; stop(name) ends it."""
        self._refuse_unless_ready()
        return await self._alive(self._generate_one(request, version, name))

    async def stop(self, name: str) -> None:
        """End a request if it still runs: its samples are what there is of them."""
        await self._alive(self._llm.abort(name))

    def _refuse_unless_ready(self) -> None:
        if self._asleep:
            raise RuntimeError(f"the engine sleeps: {', '.join(sorted(self._asleep))} must wake")
        if not self._whole:
            raise RuntimeError(
                "the weights are incomplete, since an update failed or they were dropped; they "
                "must be published again"
            )

    async def _generate_one(self, request: SamplingRequest, version: int, name: str) -> Sampled:
        from vllm import SamplingParams, TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        wanted = request.params
        # The salt keeps cached prefixes of older weights from being reused.
        prompt = TokensPrompt(
            prompt_token_ids=request.prompt.token_ids.tolist(), cache_salt=str(version)
        )
        params = SamplingParams(
            n=wanted.n,
            temperature=wanted.temperature,
            top_p=wanted.top_p,
            top_k=wanted.top_k,
            max_tokens=wanted.max_tokens,
            stop=[x for x in wanted.stop if x not in self._special],
            # Special tokens are not in the text in which stop strings are looked for.
            stop_token_ids=[self._special[x] for x in wanted.stop if x in self._special],
            include_stop_str_in_output=True,
            seed=stream_seed(request),
            logprobs=0,
            flat_logprobs=True,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        final = None
        async for output in self._llm.generate(prompt, params, name):
            final = output
        assert final is not None and final.finished and len(final.outputs) == wanted.n
        outputs = sorted(final.outputs, key=lambda o: o.index)
        return from_vllm(outputs, await self._routing(request, outputs, name))

    async def _routing(
        self, request: SamplingRequest, outputs: Sequence[Any], name: str
    ) -> tuple[Routing, ...]:
        """Of each output, where it is asked for."""
        rows = [output.routed_experts for output in outputs]
        if self._records:
            # The recorder forgets it then, so this is done in any case.
            answers = await self.call_workers("bridge_take_routing", (pickle.dumps((name,)),))
            recorded = pickle.loads(answers[0])
            rows = [recorded.get(output.index) for output in outputs]
        if not request.with_routing:
            return ()
        lengths = [len(output.token_ids) for output in outputs]
        return routing_of(rows, len(request.prompt.token_ids), lengths)

    async def call_workers(self, method: str, args: tuple[Any, ...]) -> list[Any]:
        """[worker rank]; the method of the worker extension, on every worker at once."""
        return await self._alive(self._llm.collective_rpc(method, args=args))

    async def connect(self, payload: bytes, engine: int) -> None:
        """Hand the bridge's pickled connection to the workers."""
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        request = WeightTransferInitRequest(init_info={"payload": payload, "engine": engine})
        await self._alive(self._llm.init_weight_transfer_engine(request))

    async def begin_update(self, mode: PauseMode) -> None:
        """Stop generating, and refuse to until commit: the weights are about to be a mixture."""
        self._whole = False
        held: Literal["wait", "keep"] = "wait" if mode == "wait" else "keep"
        await self._alive(self._llm.pause_generation(mode=held, clear_cache=mode != "keep"))
        await self._alive(self._llm.collective_rpc("bridge_forget_update"))
        await self._alive(self._llm.start_weight_update())

    async def receive(self, payload: bytes) -> None:
        """Returns when every worker has received everything."""
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        request = WeightTransferUpdateRequest(update_info={"payload": payload})
        await self._alive(self._llm.update_weights(request))

    async def commit(self, version: int) -> None:
        """Label what is sampled from now on, and go on generating."""
        await self._alive(self._llm.finish_weight_update(weight_version=str(version)))
        await self._alive(self._llm.resume_generation())
        self._whole = True

    async def sleep(self, level: SleepLevel) -> None:
        """Give the GPU's memory back; with level 2 the weights are gone until the next commit.

        vLLM brings back the buffers of the model itself. On CPU its workers keep everything.
        """
        self._whole = self._whole and level == 1
        self._asleep = {"weights", "kv_cache"}
        await self._alive(self._llm.sleep(level=level, mode="wait"))

    async def wake(self, parts: Sequence[EnginePart]) -> None:
        """Take memory again. The cache is empty; so are weights that were dropped."""
        is_awake = await self._alive(self._llm.wake_up(tags=list(parts)))
        self._asleep -= set(parts)
        # vLLM passes over a part that does not sleep, with a warning in the log.
        if is_awake != (not self._asleep):
            raise RuntimeError(f"the engine did not wake {', '.join(parts)}")

    async def shutdown(self) -> None:
        self._llm.shutdown(timeout=3)

    async def _alive(self, work: Coroutine[Any, Any, T] | asyncio.Future[T]) -> T:
        """The result of work, or EngineDied as soon as a process of the engine is gone.

        vLLM does not fail the utility calls that are pending when its core dies.
        """
        from vllm.v1.engine.exceptions import EngineDeadError

        task = asyncio.ensure_future(work)
        try:
            while not task.done():
                await asyncio.wait([task], timeout=0.5)
                if not task.done() and self._llm.errored:
                    raise EngineDied("its core process is gone")
            return task.result()
        except EngineDeadError:
            raise EngineDied("its core process is gone") from None
        finally:
            task.cancel()
