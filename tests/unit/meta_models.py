"""Run as a program: what Megatron's models really hold, with process groups that do nothing.

    python -m tests.unit.meta_models built MODEL:TP:PP:STAGE ...
        builds one rank of a public model with tensors that have no memory, and its optimizer
    python -m tests.unit.meta_models kept TP
        runs a small model and adds up what autograd keeps for each layer
    python -m tests.unit.meta_models waits
        trains a small model on a device without values, where what needs one raises, and tells
        which copies to it the host would wait for, and how often attention is called

Prints JSON. The groups are torch's fake ones: any world size in one process, no communication.
"""

from __future__ import annotations

import json
import sys
from typing import Any, cast
from unittest import mock

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from gpg_megatron.policy.on_cpu import (
    define_missing_names,
    quiet_megatron,
    redirect_megatron_to_cpu,
)

quiet_megatron()
define_missing_names()
redirect_megatron_to_cpu()

from megatron.core import parallel_state  # noqa: E402
from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches  # noqa: E402
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed  # noqa: E402

from benchmarks.large_layouts import QWEN2_7B, QWEN25_72B  # noqa: E402
from gpg_megatron.batching.updates import pack  # noqa: E402
from gpg_megatron.config.algorithm import AlgorithmConfig  # noqa: E402
from gpg_megatron.config.sections import PolicyConfig  # noqa: E402
from gpg_megatron.host.device import Device  # noqa: E402
from gpg_megatron.policy.model import build_model  # noqa: E402
from gpg_megatron.policy.optimizer import build_optimizer  # noqa: E402
from gpg_megatron.policy.outputs import objective_output  # noqa: E402
from gpg_megatron.policy.row import forward_arguments  # noqa: E402
from gpg_megatron.shapes import ModelShape  # noqa: E402
from gpg_megatron.types import TrainSample  # noqa: E402
from tests.samples import float32, int32  # noqa: E402
from tests.unit.meta_small import SMALL  # noqa: E402

MODELS = {"7b": QWEN2_7B, "72b": QWEN25_72B}


def join(tp: int, pp: int, stage: int, virtual: int = 1) -> PolicyConfig:
    """Be the first rank of a stage."""
    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=stage * tp, world_size=tp * pp)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
        create_gloo_process_groups=False,
    )
    model_parallel_cuda_manual_seed(1)
    return PolicyConfig(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=virtual,
    )


def built(model: str, tp: int, pp: int, virtual: int, stage: int) -> dict[str, Any]:
    """Of one rank in bf16: bytes of parameters, gradients and optimizer, elements, layers, and the
    passes forward before the first one back."""
    config = join(tp, pp, stage, virtual)

    def alone(gathered: list[Any], mine: Any, **_: Any) -> None:
        gathered[:] = [mine] * len(gathered)

    # Fake tensors cannot be moved into other parameters; they have their type from the start.
    stay = mock.patch.object(torch.nn.Module, "to", lambda self, *_, **__: self)
    gather = mock.patch.object(dist, "all_gather_object", alone)
    with stay, gather, FakeTensorMode():
        chunks = build_model(
            MODELS[model], config, dtype=torch.bfloat16, device="cpu", temperature=1.0
        )
        optimizer = build_optimizer(config, chunks, torch.bfloat16, "cpu")
        parameters = [p for ddp in chunks for p in ddp.parameters()]
        numbers = [x.layer_number - 1 for ddp in chunks for x in ddp.module.decoder.layers]
        _, _, ahead, _ = get_pp_rank_microbatches(100 * pp, virtual, pp)
        return {
            "layers": numbers,
            "ahead": ahead,
            "elements": sum(p.numel() for p in parameters),
            "parameters": sum(map(size, parameters)),
            "gradients": sum(size(p.main_grad) for p in parameters),
            "optimizer": optimizer_bytes(optimizer, {id(p) for p in parameters}),
        }


def optimizer_bytes(optimizer: Any, model: set[int]) -> int:
    """fp32 master weights, and both moments as the first step makes them."""
    total = 0
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        part.init_state_fn(part.optimizer, part.config)
        masters = [p for group in part.optimizer.param_groups for p in group["params"]]
        total += sum(size(p) for p in masters if id(p) not in model)
        states = part.optimizer.state.values()
        total += sum(size(x) for s in states for x in s.values() if torch.is_tensor(x) and x.dim())
    return total


def size(tensor: torch.Tensor) -> int:
    """Bytes."""
    return tensor.numel() * tensor.element_size()


def small(layers: int) -> ModelShape:
    return ModelShape(
        architecture="Qwen2ForCausalLM", num_layers=layers, vocab_size=512, tied=False,
        qkv_bias=True, qk_norm=False, rope_theta=1e4, rms_norm_eps=1e-6,
        max_position_embeddings=1024, **SMALL,
    )  # fmt: skip


def sample(n_prompt: int, n_response: int) -> TrainSample:
    return TrainSample(
        prompt_id="p", group=0, index=0, prompt_token_ids=int32((1,) * n_prompt),
        response_token_ids=int32((2,) * n_response),
        rollout_logprobs=float32((0.0,) * n_response), advantage=1.0, version=0,
        live=True, score=1.0,
    )  # fmt: skip


def kept(tp: int, dtype: torch.dtype) -> float:
    """Bytes per token and layer that autograd keeps, from models of two and of six layers."""
    n_tokens = 512
    totals = []
    for layers in (2, 6):
        config = join(tp, 1, 0)
        (ddp,) = build_model(small(layers), config, dtype=dtype, device="cpu", temperature=1.0)
        for parameter in ddp.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        batch = pack([sample(128, 128)] * (n_tokens // 256), [1.0] * (n_tokens // 256))
        weights = {p.untyped_storage().data_ptr() for p in ddp.parameters()}
        storages: dict[int, int] = {}
        alive: list[torch.Tensor] = []

        def keep(x: torch.Tensor, storages: dict[int, int] = storages, alive: Any = alive) -> Any:
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            alive.append(x)
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            ddp(**forward_arguments(batch, "cpu", multiple=1, flash=False)).sum()
        totals.append(sum(n for key, n in storages.items() if key not in weights))
    return (totals[1] - totals[0]) / 4 / n_tokens


class Recorder(TorchDispatchMode):
    """Names of the operations, and whether the host waits for those that cross devices."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self.calls: dict[str, int] = {}
        self.waits: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        self.calls[str(func)] = self.calls.get(str(func), 0) + 1
        out = func(*args, **kwargs)
        devices = {x.device.type for x in (*args, out) if torch.is_tensor(x) and x.dim()}
        if len(devices) > 1 and not kwargs.get("non_blocking"):
            self.waits.append(str(func))
        return out


def waits() -> dict[str, Any]:
    """Forward pass, objective and backward pass of two micro-batches."""
    config = join(1, 1, 0)
    cuda: Any = torch.cuda
    cuda.current_device = lambda: torch.device("meta")  # where Megatron puts what it makes itself
    (ddp,) = build_model(small(2), config, dtype=torch.bfloat16, device="cpu", temperature=1.0)
    model, device = ddp.module.to("meta"), cast(Device, "meta")
    model.rotary_pos_emb.inv_freq = model.rotary_pos_emb.inv_freq.to("meta")
    for parameter in model.parameters():  # torch makes new ones
        parameter.main_grad = torch.empty_like(parameter, dtype=torch.float32)
    samples = [sample(16, n) for n in (5, 7, 7)]
    algorithm = AlgorithmConfig(correction="reject-sequence")
    with Recorder() as recorder:
        for share in (True, False):
            batch = pack(samples, [1.0] * 3, share_prompts=share)
            output = model(**forward_arguments(batch, device, multiple=8, flash=True))
            loss, *_ = objective_output(algorithm, batch, None, None, output)
            loss.backward()
    return {"waits": recorder.waits, "calls": recorder.calls}


def main() -> None:
    what, *arguments = sys.argv[1:]
    if what == "built":
        result: Any = {}
        for argument in arguments:
            model, *numbers = argument.split(":")
            result[argument] = built(model, *map(int, numbers))
    elif what == "waits":
        result = waits()
    else:
        result = {str(x).removeprefix("torch."): kept(int(arguments[0]), x) for x in
                  (torch.bfloat16, torch.float32)}  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    main()
