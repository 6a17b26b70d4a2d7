"""The policy of the tests of agreement, right and with a fault; run as a script.

    python agreement_policy.py JOBS RESULTS

JOBS is a JSON file with a list of {"model": DIR, "dtype": ..., "engine_dtype": ..., "samples":
[...]}, the samples as agreement_engine.py writes them. RESULTS gets, for each of them, {fault:
{"mean", "limit", "error"}}; the limit is measured once, on the right policy.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}

import torch
import torch.distributed as dist

from gpg_megatron.host.device import init_process_group, set_threads
from gpg_megatron.policy.on_cpu import quiet_megatron

quiet_megatron()

from megatron.core import parallel_state  # noqa: E402

from gpg_megatron.batching.updates import pack  # noqa: E402
from gpg_megatron.config.sections import (  # noqa: E402
    Config,
    ModelConfig,
    PolicyConfig,
    RolloutConfig,
    TrainerConfig,
)
from gpg_megatron.layout.hf_io import load_hf  # noqa: E402
from gpg_megatron.loop.agreement import MismatchError, canary_sample  # noqa: E402
from gpg_megatron.loop.guard import Guard  # noqa: E402
from gpg_megatron.model.shape import load_model_shape  # noqa: E402
from gpg_megatron.policy.policy import Policy  # noqa: E402
from gpg_megatron.types import (  # noqa: E402
    DTYPES,
    Completion,
    Prompt,
    TrainBatch,
    VersionSpan,
)
from tests.samples import float32, int32  # noqa: E402

LR = 1e-3
STALE_AFTER = (1, 2, 4, 8, 16)
Pairs = list[tuple[Prompt, Completion]]


def main(jobs: Path, results: Path) -> None:
    set_threads(1)
    init_process_group("cpu", 120)
    found = [_try(job) for job in json.loads(jobs.read_text())]
    results.write_text(json.dumps(found))
    dist.destroy_process_group()


def _try(job: dict[str, Any]) -> dict[str, Any]:
    config = Config(
        model=ModelConfig(path=job["model"], dtype=job["dtype"]),
        policy=PolicyConfig(lr=job.get("lr", LR), clip_grad=0.0),
        rollout=RolloutConfig(dtype=job["engine_dtype"]),
        trainer=TrainerConfig(device="cpu"),
    )
    shape = load_model_shape(job["model"])
    policy = Policy(config, shape, "cpu")
    load_hf(job["model"], policy.named_shards(), shape, policy.position)
    policy.weights_loaded()
    pairs = [_pair(i, *sample) for i, sample in enumerate(job["samples"])]
    coarser = "bf16" if "bf16" in (job["dtype"], job["engine_dtype"]) else "fp32"
    guard = Guard(
        tolerance=None,
        coarser=DTYPES[coarser],
        judges_rollouts=True,
        draws_ahead=False,
        max_bad_steps=3,
        samples_file=Path("unused"),
        say=print,
        is_rank0=True,
    )
    guard.measure(pairs, policy)
    seen = {"none": _judge(guard, pairs, policy)}
    for name, fault in FAULTS.items():
        with fault(policy):
            seen[name] = _judge(guard, pairs, policy)
    seen["none, again"] = _judge(guard, pairs, policy)
    for n in range(1, max(STALE_AFTER) + 1):
        policy.train(_batch(pairs))
        if n in STALE_AFTER:
            seen[f"stale by {n}"] = _judge(guard, pairs, policy)
    parallel_state.destroy_model_parallel()
    return seen


def _judge(guard: Guard, pairs: Pairs, policy: Policy) -> dict[str, Any]:
    """The verdict, and the numbers behind it."""
    error = None
    try:
        guard.check_canary("now", pairs, policy)
    except MismatchError as refusal:
        error = str(refusal)
    lenient = Guard(
        tolerance=1e9,
        coarser=torch.float32,
        judges_rollouts=True,
        draws_ahead=False,
        max_bad_steps=3,
        samples_file=Path("unused"),
        say=print,
        is_rank0=True,
    )
    found = lenient.check_canary("now", pairs, policy)
    return {
        "mean": found.mean,
        "max": found.largest,
        "limit": guard.limit.of(found),
        "error": error,
    }


# ---- faults ------------------------------------------------------------------------------------


@contextmanager
def _other_base(policy: Policy) -> Iterator[None]:
    """Rotary embeddings of base 1e4 become those of base 1e6."""
    rotary = policy._models[0].rotary_pos_emb
    right = rotary.inv_freq
    rotary.inv_freq = right**1.5
    # Megatron keeps what it computed for a length.
    getattr(rotary.forward, "cache_clear", lambda: None)()
    yield
    rotary.inv_freq = right
    getattr(rotary.forward, "cache_clear", lambda: None)()


@contextmanager
def _changed(policy: Policy, change: Callable[[dict[str, torch.Tensor]], None]) -> Iterator[None]:
    shards = policy.named_shards()
    kept = {name: shard.clone() for name, shard in shards.items()}
    change(shards)
    yield
    for name, shard in shards.items():
        shard.copy_(kept[name])


def _lose_biases(shards: dict[str, torch.Tensor]) -> None:
    for name, shard in shards.items():
        if name.endswith("linear_qkv.bias"):
            shard.zero_()


def _swap_norms(shards: dict[str, torch.Tensor]) -> None:
    for name, q_norm in shards.items():
        if "q_layernorm" in name:
            k_norm = shards[name.replace("q_layernorm", "k_layernorm")]
            kept = q_norm.clone()
            q_norm.copy_(k_norm)
            k_norm.copy_(kept)


FAULTS: dict[str, Callable[[Policy], Any]] = {
    "other rope base": _other_base,
    "lost biases": lambda policy: _changed(policy, _lose_biases),
    "swapped q and k norms": lambda policy: _changed(policy, _swap_norms),
}


# ---- what the policy learns, so that the engine is left behind ---------------------------------


def _pair(number: int, prompt: list[int], response: list[int], logprobs: list[float]) -> Any:
    name = f"p/{number}"
    completion = Completion(
        prompt_id=name,
        index=0,
        token_ids=int32(response),
        logprobs=float32(logprobs),
        finish_reason="length",
        text="",
        versions=(VersionSpan(version=0, start=0, end=len(response)),),
    )
    ids = int32(prompt)
    return Prompt(id=name, token_ids=ids, messages=(), ground_truth="", data_source="p"), completion


def _batch(pairs: Pairs) -> TrainBatch:
    """Every other sample is good."""
    samples = [
        replace(canary_sample(p, c), advantage=1.0 if i % 2 else -1.0)
        for i, (p, c) in enumerate(pairs)
    ]
    n = sum(len(sample.response_token_ids) for sample in samples)
    return TrainBatch(
        micro_batches=(pack(samples, [1.0 / n] * len(samples)),),
        n_computed_tokens=n,
        n_skipped_tokens=0,
        n_shared_tokens=0,
        n_loss_tokens=n,
        unrouted=1.0,
        flops=0.0,
        alpha=1.0,
        whole_alpha=1.0,
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
