"""One rank: what saving and resuming take of host memory; verdicts to FOLDER/dp<n>-rank<r>.json.

torchrun ... -m tests.dist.memory_worker FOLDER

FOLDER/model/ holds the model's config.json.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from gpg_megatron.config.sections import Config, ModelConfig, PolicyConfig
from gpg_megatron.host.device import init_process_group
from gpg_megatron.model.shape import load_model_shape
from gpg_megatron.policy.on_cpu import quiet_megatron


def main() -> None:
    quiet_megatron()
    from gpg_megatron.policy.checkpoint import CheckpointWriter, make_folders
    from gpg_megatron.policy.policy import Policy
    from gpg_megatron.policy.shards import begin_states

    init_process_group("cpu", 120)
    folder, rank, size = Path(sys.argv[1]), dist.get_rank(), dist.get_world_size()
    config = Config(
        model=ModelConfig(path=str(folder / "model"), dtype="bf16"),
        policy=PolicyConfig(data_parallel_size=size, use_distributed_optimizer=True),
    )
    policy = Policy(config, load_model_shape(folder / "model", need_weights=False), "cpu")
    for number, shard in enumerate(policy.named_shards().values()):
        shard.fill_(1.0 + number)
    policy.weights_loaded()
    begin_states(policy._optimizer)
    directory = folder / f"dp{size}"
    if rank == 0:
        make_folders(directory)
    dist.barrier()
    writer = CheckpointWriter(asynchronous=False)
    small = torch.zeros(1)
    dist.all_reduce(small)  # its buffers are not counted
    saved = _peak(lambda: policy.save(directory, writer, lambda: None))
    resumed = _peak(lambda: policy.resume(directory, version=3, same_ranks=True))
    verdict = {
        "parameters": sum(t.nbytes for t in policy.named_shards().values()),
        "optimizer": sum(
            t.nbytes
            for part in policy._optimizer.chained_optimizers
            for group in part.optimizer.param_groups
            for main in group["params"]
            for t in (main, *(part.optimizer.state[main][k] for k in ("exp_avg", "exp_avg_sq")))
        ),
        "written": sum(f.stat().st_size for f in directory.glob(f"__{rank}_*.distcp")),
        "save_peak": saved,
        "resume_peak": resumed,
    }
    (folder / f"dp{size}-rank{rank}.json").write_text(json.dumps(verdict))
    dist.destroy_process_group()


def _peak(work: Callable[[], None]) -> int:
    """Bytes by which the process's resident memory rose at most, while it worked."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is resident
    before = _status("VmRSS")
    work()
    return _status("VmHWM") - before


def _status(key: str) -> int:
    found = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found
    return int(found[1]) << 10


if __name__ == "__main__":
    main()
