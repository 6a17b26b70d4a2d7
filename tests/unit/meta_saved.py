"""Run as a program: what ranks of a public model write of a checkpoint, with tensors that have no
memory and process groups that do nothing.

    python -m tests.unit.meta_saved TP:PP:DP RANK ...

Prints a JSON list: bytes that each rank holds of the optimizer and writes, and its shards.
"""

from __future__ import annotations

import json
import sys
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import is_main_replica
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks.large_layouts import QWEN2_7B
from gpg_megatron.config.sections import PolicyConfig
from gpg_megatron.policy.checkpoint import _state
from gpg_megatron.policy.model import build_model
from gpg_megatron.policy.optimizer import build_optimizer
from tests.unit.meta_models import optimizer_bytes  # patches Megatron first


def saved(tp: int, pp: int, dp: int, rank: int) -> dict[str, int]:
    """Of one rank of Qwen2-7B in bf16 with the distributed optimizer."""
    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=tp * pp * dp)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        create_gloo_process_groups=False,
    )
    model_parallel_cuda_manual_seed(1)
    config = PolicyConfig(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        data_parallel_size=dp,
        use_distributed_optimizer=True,
    )

    def alone(gathered: list[Any], mine: Any, **_: Any) -> None:
        gathered[:] = [mine] * len(gathered)

    # Fake tensors cannot be moved into other parameters; they have their type from the start.
    stay = mock.patch.object(torch.nn.Module, "to", lambda self, *_, **__: self)
    gather = mock.patch.object(dist, "all_gather_object", alone)
    with stay, gather, FakeTensorMode():
        chunks = build_model(QWEN2_7B, config, dtype=torch.bfloat16, device="cpu", temperature=1.0)
        optimizer = build_optimizer(config, chunks, torch.bfloat16, "cpu")
        held = optimizer_bytes(optimizer, {id(p) for p in chunks[0].parameters()})
        shards = _state([chunks[0].module], optimizer).values()
        return {
            "held": held,
            "written": sum(s.data.nbytes for s in shards if is_main_replica(s.replica_id)),
            "read": sum(s.data.nbytes for s in shards),
            "shards": len(shards),
        }


def main() -> None:
    layout, *ranks = sys.argv[1:]
    tp, pp, dp = map(int, layout.split(":"))
    print(json.dumps([saved(tp, pp, dp, int(rank)) for rank in ranks]))


if __name__ == "__main__":
    main()
