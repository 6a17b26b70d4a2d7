"""One rank that goes on from the checkpoint of an earlier version; losses to FOLDER/tp<n>.json.

torchrun ... -m tests.dist.saved_before_worker FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch.distributed as dist

from gpg_megatron.batching.updates import make_batches
from gpg_megatron.host.device import init_process_group
from gpg_megatron.model.shape import load_model_shape
from gpg_megatron.policy.on_cpu import quiet_megatron
from tests.saved_before.problem import MODEL, STEP, config, plan, samples


def main() -> None:
    quiet_megatron()
    from gpg_megatron.policy.policy import Policy

    init_process_group("cpu", 120)
    size, folder = dist.get_world_size(), Path(sys.argv[1])
    settings = config(size, folder)
    policy = Policy(settings, load_model_shape(MODEL), "cpu")
    policy.resume(STEP, version=2, same_ranks=size == 2)
    batches = make_batches(samples(), plan(settings))
    losses = [policy.learn(batches)[0].loss for _ in range(2)]
    if dist.get_rank() == 0:
        (folder / f"tp{size}.json").write_text(json.dumps(losses))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
