"""One policy rank of the bridge's test matrix.

    torchrun ... -m tests.stack.bridge_ranks JOB.json

Starts the engines once, then, for every layout of the job: builds the policy, opens a bridge,
loads each checkpoint in turn, publishes it and compares log-probs. Rank 0 writes the results.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from gpg_megatron.host.device import Device, init_process_group, set_threads
from gpg_megatron.policy.on_cpu import quiet_megatron

quiet_megatron()

from megatron.core import parallel_state  # noqa: E402

from benchmarks.bridge import open_bridge  # noqa: E402
from gpg_megatron.batching.updates import pack  # noqa: E402
from gpg_megatron.bridge.engine_layout import Engine  # noqa: E402
from gpg_megatron.bridge.forecast import forecast  # noqa: E402
from gpg_megatron.bridge.plan import bucket_elements  # noqa: E402
from gpg_megatron.bridge.protocol import BACKEND, RECEIVER  # noqa: E402
from gpg_megatron.config.loading import load_config  # noqa: E402
from gpg_megatron.config.sections import Config  # noqa: E402
from gpg_megatron.host.collectives import on_rank0  # noqa: E402
from gpg_megatron.host.reaper import scratch_directory  # noqa: E402
from gpg_megatron.layout.hf_io import load_hf  # noqa: E402
from gpg_megatron.layout.topology import policy_grid  # noqa: E402
from gpg_megatron.loop.agreement import canary_sample  # noqa: E402
from gpg_megatron.model.shape import load_model_shape  # noqa: E402
from gpg_megatron.policy.policy import Policy  # noqa: E402
from gpg_megatron.rollout.fleet import Fleet  # noqa: E402
from gpg_megatron.rollout.sampling import SamplingRequest  # noqa: E402
from gpg_megatron.rollout.spec import EngineSpec  # noqa: E402
from gpg_megatron.shapes import ModelShape  # noqa: E402
from gpg_megatron.types import DTYPES, Completion, Prompt, SamplingParams  # noqa: E402
from tests.samples import int32  # noqa: E402

COLLECTIVE_LIMIT_S = 300
PROMPTS = ((10, 20, 30), (40, 50), (60, 70, 80, 90, 100), (7, 7, 7, 7))


@dataclass(kw_only=True)
class Result:
    """One publish."""

    layout: str
    checkpoint: int
    gap: float
    """Largest |engine - policy| log-prob over the sampled tokens."""
    mean_gap: float
    """Of all of them."""
    versions: list[int]
    """With which the samples were stamped."""
    sent_bytes: int
    """By all ranks."""
    needed_bytes: int
    """By all workers."""


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    set_threads(1)
    init_process_group(device_of(job), COLLECTIVE_LIMIT_S)
    fleet = Fleets(job)
    results = []
    try:
        for name, policy_section in job["layouts"].items():
            config = configuration(job, policy_section)
            results += try_layout(name, config, job, fleet)
            parallel_state.destroy_model_parallel()
    finally:
        fleet.close()
    if dist.get_rank() == 0:
        Path(job["out"]).write_text(json.dumps([asdict(r) for r in results]))
    dist.destroy_process_group()


class Fleets:
    """The engines on rank 0; nothing on the others."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.fleet: Fleet | None = None

        def start() -> None:
            config = configuration(job, {})
            scratch = scratch_directory(job["run_id"])
            shape = load_model_shape(job["checkpoints"][0])
            spec = EngineSpec(
                rollout=config.rollout,
                model_path=job["checkpoints"][0],
                device=device_of(job),
                max_model_len=128,
                max_num_seqs=16,
                max_num_batched_tokens=8192,
                has_states=shape.delta is not None,
                is_latent=shape.latent is not None,
                replaces_lost=job.get("replaces_lost", False),
                worker_extension=job.get("extension", RECEIVER),
                weight_transfer=BACKEND,
                scratch=scratch,
            )
            self.fleet = Fleet.start(spec, run_id=job["run_id"], log_dir=scratch)
            self.fleet.wait_ready()

        on_rank0(start)

    def generate(self, version: int) -> list[tuple[Prompt, Completion]]:
        """A few samples; collective."""
        prompts = [
            Prompt(id=f"p/{i}", token_ids=int32(ids), messages=(), ground_truth="", data_source="p")
            for i, ids in enumerate(PROMPTS)
        ]
        params = SamplingParams(
            n=1, temperature=0.8, top_p=1.0, top_k=-1, max_tokens=12, stop=(), seed=version
        )
        requests = [SamplingRequest(prompt=p, params=params) for p in prompts]

        def generate() -> list[Completion]:
            assert self.fleet is not None
            return self.fleet.generate(requests)

        completions = on_rank0(generate)
        return list(zip(prompts, completions, strict=True))

    def close(self) -> None:
        if self.fleet is not None:
            self.fleet.close()


def configuration(job: dict[str, Any], policy: dict[str, int]) -> Config:
    text = {
        "data": {"train_files": ["unused"], "max_prompt_length": 64},
        "model": {"path": job["checkpoints"][0], "dtype": job["dtype"]},
        "policy": policy,
        "rollout": {
            "dtype": job["dtype"],
            "temperature": 0.8,
            "max_response_length": 64,
            "kv_cache_gb": 0.125,
            "enforce_eager": True,
            "gpu_memory_utilization": 0.3,
            "max_num_seqs": 16,
            "tensor_model_parallel_size": job["engine_tp"],
            "num_engines": job["num_engines"],
            "startup_timeout_s": 240,
        },
        "bridge": {
            "transport": job["transport"],
            "verify": "always",
            "bucket_mb": 1,
            "timeout_s": job.get("bridge_timeout_s", 120),
        },
        "trainer": {"device": device_of(job)},
    }
    path = Path(job["out"]).with_suffix(f".{dist.get_rank()}.yaml")
    path.write_text(json.dumps(text))
    return load_config(path)


def device_of(job: dict[str, Any]) -> Device:
    device: Device = job.get("device", "cpu")
    return device


def try_layout(name: str, config: Config, job: dict[str, Any], fleet: Fleets) -> list[Result]:
    shape = load_model_shape(config.model.path)
    policy = Policy(config, shape, device_of(job))
    bridge = open_bridge(config, policy, fleet.fleet, shape, job["run_id"])
    engine = Engine(model=shape, tp_size=config.rollout.tensor_model_parallel_size)
    needed = forecast(policy_grid(config.policy, shape), engine, bridge.links).bound
    item = DTYPES[config.rollout.dtype].itemsize
    results = []
    # The engine starts with the first checkpoint: only the others show that something arrived.
    first, *others = job["checkpoints"]
    for number, checkpoint in enumerate((*others, first), start=1):
        load_hf(checkpoint, policy.named_shards(), shape, policy.position)
        bridge.publish(number)
        sent = item * sum(bucket_elements(message.bucket) for message in bridge.messages)
        results.append(compare(name, number, policy, shape, fleet, sent, item * needed))
    bridge.close()
    return results


def compare(
    name: str, number: int, policy: Policy, shape: ModelShape, fleet: Fleets, sent: int, needed: int
) -> Result:
    pairs = fleet.generate(number)
    batch = pack([canary_sample(p, c) for p, c in pairs], [1.0] * len(pairs))
    (logprobs,) = policy.logprobs([batch])
    gaps = (logprobs.cpu() - batch.rollout_logprobs_T[batch.loss_mask_T]).abs()
    total = torch.tensor([sent])
    dist.all_reduce(total)
    return Result(
        layout=name,
        checkpoint=number,
        gap=gaps.max().item(),
        mean_gap=gaps.mean().item(),
        versions=sorted({span.version for _, c in pairs for span in c.versions}),
        sent_bytes=int(total),
        needed_bytes=needed,
    )


if __name__ == "__main__":
    main()
