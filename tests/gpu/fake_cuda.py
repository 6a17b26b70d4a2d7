"""What a rank of a large model does on a GPU, computed without one: torch's CUDA build, tensors
without values, and process groups that do nothing.

    tests/gpu/fake_cuda.sh DIR [CONFIG:RANK ...]     in an environment of its own
    python -m tests.gpu.fake_cuda [CONFIG:RANK ...]  in one that has torch's CUDA build

The real Policy is built for device cuda and runs a full micro-batch forward. Prints what it holds
in GiB, beside what the dry run says of that rank; what would have been made on the CPU ends it.
Where whole layers are computed again, the dry run counts one complete layer: the backward pass
holds it. Not in the ordinary tests: the build and its libraries take 5 GB.
"""

from __future__ import annotations

import json
import os
import sys
import weakref
from collections import Counter
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import fields, is_dataclass, replace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gpg_megatron.policy.on_cpu import quiet_megatron

quiet_megatron()

from megatron.core import parallel_state  # noqa: E402
from megatron.core.tensor_parallel import random as megatron_random  # noqa: E402

from gpg_megatron.batching.updates import pack  # noqa: E402
from gpg_megatron.config.loading import load_config  # noqa: E402
from gpg_megatron.config.sections import GIB, Config  # noqa: E402
from gpg_megatron.model.hub import SHAPES  # noqa: E402
from gpg_megatron.placement.memory import micro_batches_per_update  # noqa: E402
from gpg_megatron.policy.policy import Policy  # noqa: E402
from gpg_megatron.policy.row import forward_arguments  # noqa: E402
from gpg_megatron.start.dry_run import plan_run  # noqa: E402
from gpg_megatron.start.run_plan import Stage  # noqa: E402
from gpg_megatron.types import MicroBatch, TrainSample  # noqa: E402
from tests.samples import float32, int32  # noqa: E402

CASES = (
    "qwen2-7b_math_megatron:0",
    "qwen2-7b_math_megatron:4",
    "qwen2-7b_math:0",
    "qwen3-8b_math_megatron:0",
    "qwen2.5-72b_math_megatron:0",
    "qwen2.5-72b_math_megatron:31",
)
GPU = torch.device("cuda", 0)
NO_KERNEL = [["prim", "device"], ["aten", "empty"], ["aten", "_unsafe_view"]]


class Held(TorchDispatchMode):
    """Counts operations that are kernels, and the bytes of what they leave on the GPU."""

    def __init__(self, before: Iterable[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self.kernels: Counter[str] = Counter()
        self.n_bytes = 0
        self._seen = {x.untyped_storage()._cdata for x in before}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        new = [x for x in tree_leaves(out) if torch.is_tensor(x) and x.device == GPU]
        if not func.is_view and str(func).split(".")[:2] not in NO_KERNEL:
            self.kernels[str(func)] += 1
        for tensor in new:
            self._hold(tensor.untyped_storage())
        return out

    def _hold(self, storage: torch.UntypedStorage) -> None:
        key, n_bytes = storage._cdata, storage.nbytes()
        if key not in self._seen:
            self._seen.add(key)
            self.n_bytes += n_bytes
            weakref.finalize(storage, self._free, key, n_bytes)

    def _free(self, key: int, n_bytes: int) -> None:
        self._seen.discard(key)
        self.n_bytes -= n_bytes


def pretend() -> None:
    """What asks the driver, which is not there, answers as with one GPU."""
    torch._C._ensureCUDADeviceGuardSet()
    cuda: Any = torch.cuda
    cuda.is_available = lambda: True
    cuda.current_device = lambda: 0
    for name in ("synchronize", "manual_seed", "empty_cache"):
        setattr(cuda, name, lambda *_: None)
    states: Any = megatron_random
    cuda.get_rng_state = states._get_cuda_rng_state = lambda *_, **__: torch.zeros(16)
    states._set_cuda_rng_state = lambda *_, **__: None
    states.CudaRNGStatesTracker.fork = lambda *_, **__: nullcontext()
    make = torch.tensor
    library: Any = torch

    def tensor(data: Any, *, device: Any = None, **kw: Any) -> torch.Tensor:
        """On the GPU without the values, which would be copied there."""
        host: torch.Tensor = make(data, **kw)
        on_gpu = torch.device(device or "cpu").type == "cuda"
        return torch.empty(host.shape, dtype=host.dtype, device=GPU) if on_gpu else host

    library.tensor = tensor
    kinds = {torch.float32: "FloatTensor", torch.bfloat16: "BFloat16Tensor"}
    library.Tensor.type = lambda x: f"torch.{x.device.type}.{kinds[x.dtype]}"


def fake_groups() -> None:
    """Groups of any backend do nothing, and what they gather is alike everywhere."""
    make = dist.new_group
    groups: Any = dist
    groups.new_group = lambda *args, **kw: make(*args, **kw | {"backend": "fake"})
    groups.all_gather_object = alone


def move(module: torch.nn.Module, *, dtype: torch.dtype, **_: Any) -> torch.nn.Module:
    """Module.to, whose way of changing a parameter in place needs values."""
    for part in module.modules():
        for name, old in part._parameters.items():
            if old is not None and (old.device, old.dtype) != (GPU, dtype):
                new = torch.nn.Parameter(torch.empty_like(old, dtype=dtype, device=GPU))
                new.__dict__ |= old.__dict__ | new.__dict__  # Megatron's marks, and the new device
                part._parameters[name] = new
    return module


def alone(gathered: list[Any], mine: Any, **_: Any) -> None:
    """all_gather_object of ranks that are all alike."""
    gathered[:] = [mine] * len(gathered)


def full_row(config: Config) -> MicroBatch:
    """Groups of the configuration's size, prompts and responses of a quarter and half of the
    longest, until the micro-batch is full."""
    prompt, response = config.data.max_prompt_length // 4, config.rollout.max_response_length // 2
    samples: list[TrainSample] = []
    while True:
        group = [
            TrainSample(
                prompt_id="p", group=len(samples), index=i,
                prompt_token_ids=int32((1,) * prompt), response_token_ids=int32((2,) * response),
                rollout_logprobs=float32((0.0,) * response),
                advantage=1.0, version=0, live=True, score=1.0,
            )
            for i in range(config.rollout.n)
        ]  # fmt: skip
        wider = samples + group
        row = pack(wider, [1.0] * len(wider), share_prompts=config.policy.share_prompts)
        if len(row.input_ids_T) > config.policy.row_tokens:
            return pack(samples, [1.0] * len(samples), share_prompts=config.policy.share_prompts)
        samples = wider


def n_bytes(tensors: Any) -> int:
    """Of their storages, each counted once."""
    return sum({x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in tensors}.values())


def try_rank(case: str) -> dict[str, Any]:
    """Build the policy of one rank, and compute a micro-batch."""
    name, rank = case.split(":")
    config = load_config(f"configs/{name}.yaml", ["trainer.device=cuda"])
    config = replace(config, model=replace(config.model, path=str(SHAPES / config.model.path)))
    plan = plan_run(config, device="cuda")
    stage = next(s for s in plan.stages if int(rank) in s.ranks)
    world = config.policy.world_size
    os.environ |= {"RANK": rank, "WORLD_SIZE": str(world), "LOCAL_RANK": "0"}
    dist.init_process_group("fake", store=FakeStore(), rank=int(rank), world_size=world)
    to = mock.patch.object(torch.nn.Module, "to", move)
    to = mock.patch.object(torch.nn.Module, "to", move)
    with to, FakeTensorMode(allow_non_fake_inputs=True) as fake:
        policy = Policy(config, plan.shape, "cuda")
    (model,), optimizer = policy._models, policy._optimizer
    parameters = list(model.parameters())
    masters = [p for group in optimizer.param_groups for p in group["params"]]
    assert {x.device for x in (*parameters, *(p.main_grad for p in parameters), *masters)} == {GPU}
    row = full_row(config)
    n_tokens, n_layers = len(row.input_ids_T), len(stage.layers)
    arguments = forward_arguments(row, "cpu", **policy._row_form)
    with fake:
        if stage.number:
            hidden = -(-n_tokens // policy._row_form["multiple"]), 1, plan.shape.hidden_size
            model.set_input_tensor(torch.empty(hidden, dtype=torch.bfloat16, device=GPU))
        with Held(p.data for p in parameters) as forward:
            output = model(**on_gpu(arguments))  # keeps what the backward pass needs
    assert output.device == GPU
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
    return {
        "case": case,
        "parameters_gib": gib(n_bytes(p.data for p in parameters)),
        "parameters_planned": gib(stage.memory.parameters),
        "gradients_gib": gib(n_bytes(p.main_grad for p in parameters)),
        "gradients_planned": gib(stage.memory.gradients),
        "optimizer_gib": gib(3 * n_bytes(masters)),
        "optimizer_planned": gib(stage.memory.optimizer),
        "tokens": n_tokens,
        "activations_gib": gib(forward.n_bytes),
        "activations_planned": gib(planned_activations(config, stage) * n_tokens),
        "flash_calls": forward.kernels["aten._flash_attention_forward.default"],
        "layers": n_layers,
        "kernels_per_layer": round(sum(forward.kernels.values()) / n_layers),
    }


def planned_activations(config: Config, stage: Stage) -> float:
    """Bytes of one token of one micro-batch."""
    p = config.policy
    in_flight = min(p.pipeline_model_parallel_size - stage.number, micro_batches_per_update(config))
    return stage.memory.activations / in_flight / p.row_tokens


def on_gpu(values: Any) -> Any:
    """The same objects with tensors on the GPU, without their values."""
    if torch.is_tensor(values):
        return torch.empty(values.shape, dtype=values.dtype, device=GPU)
    if isinstance(values, dict):
        return {key: on_gpu(value) for key, value in values.items()}
    if is_dataclass(values) and not isinstance(values, type):
        return replace(values, **{f.name: on_gpu(getattr(values, f.name)) for f in fields(values)})
    return values


def gib(n: float) -> float:
    """Two digits after the point."""
    return round(n / GIB, 2)


def main() -> None:
    pretend()
    fake_groups()
    for case in sys.argv[1:] or CASES:
        print(json.dumps(try_rank(case)), flush=True)


if __name__ == "__main__":
    main()
