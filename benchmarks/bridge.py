"""Seconds, bytes and memory of one publish, against a plain copy and against gather + reload.

    python -m benchmarks.bridge [--tp 2 --pp 1 --engine-tp 1] [--rounds 7] [--model DIR]

Real Megatron ranks and a real vLLM engine on this machine. Without --model, a random Llama of
about 120 million parameters is made. All ways are timed in the same run, in turns, on the same
weights; the medians are reported. The last line is JSON:

    bytes_over_bound          bytes moved / bytes that the engine's workers must receive
    seconds_over_copy         publish / copying the same bytes from one process to another
    peak_extra_bytes          slots of all senders plus staging of the engine, at its largest
    peak_extra_over_minimum   the same / (slots plus the largest module that must be staged)
    repack_s                  mean seconds of a publish in which the engine repacks what arrived
    canary_logprob_max        largest |engine - policy| log-prob after the last publish
    speedup_over_gather_reload  seconds of gathering full tensors on rank 0 and
                              Worker.reload_weights / seconds of a publish
    gather_extra_bytes        full tensors in shared memory, as the second way needs them
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.bridge_rivals import GatherReload, PlainCopy
from gpg_megatron.config.loading import load_config
from gpg_megatron.config.sections import Config

EXTENSION = "benchmarks.bridge_worker.BenchReceiver"
PROMPTS = 4
ANSWER = 16


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="Hugging Face directory")
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--pp", type=int, default=1)
    parser.add_argument("--engine-tp", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--bucket-mb", type=int, default=16)
    parser.add_argument("--transport", default="auto")
    args = parser.parse_args(argv)
    if "RANK" in os.environ:
        return run_rank(args)
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from gpg_megatron.host.reaper import RUN_ID_VARIABLE, cleanup_run, new_run_id, start_reaper

    run_id = os.environ[RUN_ID_VARIABLE] = new_run_id()
    start_reaper(run_id)
    try:
        with tempfile.TemporaryDirectory() as folder:
            model = args.model or make_model(Path(folder) / "model")
            world = LaunchConfig(
                min_nodes=1,
                max_nodes=1,
                nproc_per_node=args.tp * args.pp,
                run_id=run_id,
                rdzv_backend="c10d",
                rdzv_endpoint="localhost:0",
                max_restarts=0,
            )
            given = [f"--{k.replace('_', '-')}={v}" for k, v in vars(args).items() if k != "model"]
            elastic_launch(world, sys.executable)(
                "-m", "benchmarks.bridge", f"--model={model}", *given
            )
    finally:
        cleanup_run(run_id)
    return 0


def make_model(folder: Path) -> Path:
    """A random untied Llama: reload_weights is right on a CPU only where nothing is tied."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from gpg_megatron.demo.model import build_tokenizer

    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=32000,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(shape).save_pretrained(folder)
    build_tokenizer(["the quick brown fox"], 300).save_pretrained(folder)
    return folder


def configuration(args: argparse.Namespace, folder: Path) -> Config:
    text = {
        "data": {"train_files": ["unused"], "max_prompt_length": 64},
        "model": {"path": str(args.model), "dtype": "fp32"},
        "policy": {
            "tensor_model_parallel_size": args.tp,
            "pipeline_model_parallel_size": args.pp,
        },
        "rollout": {
            "dtype": "fp32",
            "tensor_model_parallel_size": args.engine_tp,
            "kv_cache_gb": 0.25,
            "enforce_eager": True,
            "max_response_length": 64,
        },
        "bridge": {"bucket_mb": args.bucket_mb, "transport": args.transport, "verify": "never"},
        "trainer": {"device": "cpu"},
    }
    path = folder / "config.yaml"
    path.write_text(json.dumps(text))
    return load_config(path)


def run_rank(args: argparse.Namespace) -> int:
    """One policy rank; rank 0 reports."""
    from gpg_megatron.host.collectives import on_rank0
    from gpg_megatron.host.device import init_process_group, set_threads
    from gpg_megatron.host.reaper import RUN_ID_VARIABLE, scratch_directory
    from gpg_megatron.policy.on_cpu import quiet_megatron

    quiet_megatron()
    from gpg_megatron.layout.hf_io import load_hf
    from gpg_megatron.model.shape import load_model_shape
    from gpg_megatron.policy.policy import Policy

    set_threads(None)
    init_process_group("cpu", 600)
    run_id = os.environ[RUN_ID_VARIABLE]
    scratch = scratch_directory(run_id)
    config = on_rank0(lambda: configuration(args, scratch))
    shape = load_model_shape(config.model.path)
    fleet: list[Any] = []
    on_rank0(lambda: fleet.append(start_fleet(config, run_id, scratch)))
    try:
        policy = Policy(config, shape, "cpu")
        load_hf(config.model.path, policy.named_shards(), shape, policy.position)
        on_rank0(lambda: fleet[0].wait_ready())
        engines = fleet[0] if fleet else None
        bridge = open_bridge(config, policy, engines, shape, run_id)
        report = measure(args, policy, bridge, engines, shape)
    finally:
        for engine in fleet:
            engine.close()
    if dist.get_rank() == 0:
        print(json.dumps(report))
    dist.destroy_process_group()
    return 0


def start_fleet(config: Config, run_id: str, scratch: Path) -> Any:
    from gpg_megatron.bridge.protocol import BACKEND
    from gpg_megatron.rollout.fleet import Fleet
    from gpg_megatron.rollout.spec import EngineSpec

    spec = EngineSpec(
        rollout=config.rollout,
        model_path=str(Path(config.model.path).absolute()),
        device="cpu",
        max_model_len=128,
        max_num_seqs=16,
        max_num_batched_tokens=8192,
        worker_extension=EXTENSION,
        weight_transfer=BACKEND,
        scratch=scratch,
    )
    return Fleet.start(spec, run_id=run_id, log_dir=scratch)


def open_bridge(config: Config, policy: Any, engines: Any, shape: Any, run_id: str) -> Any:
    from gpg_megatron.bridge.bridge import PolicySide, WeightBridge
    from gpg_megatron.layout.topology import policy_grid
    from gpg_megatron.types import DTYPES

    side = PolicySide(
        shards=policy.named_shards(),
        model=shape,
        grid=policy_grid(config.policy, shape),
        rank=dist.get_rank(),
    )
    world = dist.group.WORLD
    assert world is not None
    wire_dtype = DTYPES[config.rollout.dtype]
    return WeightBridge(
        side, engines, config.bridge, wire_dtype=wire_dtype, run_id=run_id, group=world
    )


def measure(
    args: argparse.Namespace, policy: Any, bridge: Any, fleet: Any, shape: Any
) -> dict[str, Any]:
    """The three ways in turns; every rank calls, rank 0's numbers count."""
    from gpg_megatron.bridge.plan import bucket_elements
    from gpg_megatron.bridge.transports.base import SLOTS
    from gpg_megatron.layout.topology import hf_shapes

    bound = sum(_on0(lambda: _calls(fleet, "bench_parameter_bytes")))
    full = sum(torch.Size(s).numel() for s in hf_shapes(shape).values()) * 4
    gather = GatherReload(policy, shape, fleet, full)
    copy = PlainCopy(bound)
    seconds: dict[str, list[float]] = {"publish": [], "copy": [], "gather": []}
    for number in range(args.rounds + 1):
        _disturb(policy.named_shards(), number)

        def publish(number: int = number) -> None:
            bridge.publish(number)

        rows = (("gather", gather.run), ("copy", copy.run), ("publish", publish))
        for name, action in rows:
            elapsed = _timed(action)
            if number:  # the first round warms up
                seconds[name].append(elapsed)
    buckets = [4 * bucket_elements(message.bucket) for message in bridge.messages]
    total = torch.tensor([sum(buckets)], dtype=torch.int64)
    dist.all_reduce(total)
    slots = torch.tensor([SLOTS * max(buckets, default=0)], dtype=torch.int64)
    dist.all_reduce(slots)
    staged = max(_on0(lambda: _calls(fleet, "bench_staged_bytes")))
    largest = max(_on0(lambda: _calls(fleet, "bench_largest_module_bytes")))
    effect = max(_on0(lambda: _calls(fleet, "bench_effect_seconds"))) / (args.rounds + 1)
    canary = _canary(policy, fleet, shape)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    copy.close()
    gather.close()
    return {
        "machine": f"{os.cpu_count()} cores",
        "parameters": full // 4,
        "policy": f"TP{args.tp} x PP{args.pp}",
        "engine": f"TP{args.engine_tp}",
        "transport": args.transport,
        "publish_s": median["publish"],
        "copy_s": median["copy"],
        "repack_s": effect,
        "gather_reload_s": median["gather"],
        "bytes_over_bound": int(total) / bound,
        "seconds_over_copy": median["publish"] / median["copy"],
        "peak_extra_bytes": int(slots) + staged,
        "peak_extra_over_minimum": (int(slots) + staged) / (int(slots) + largest),
        "canary_logprob_max": canary,
        "speedup_over_gather_reload": median["gather"] / median["publish"],
        "gather_extra_bytes": full,
    }


def _timed(action: Callable[[], None]) -> float:
    dist.barrier()
    begin = time.perf_counter()
    action()
    dist.barrier()
    return time.perf_counter() - begin


def _disturb(shards: Mapping[str, torch.Tensor], seed: int) -> None:
    """Other weights for every round, the same on ranks that hold copies."""
    for name, tensor in shards.items():
        scale = 1 + 0.01 * ((hash_of(name) + seed) % 7 - 3) / 3
        tensor.mul_(scale)


def hash_of(name: str) -> int:
    """The same in every process, unlike hash()."""
    return sum(map(ord, name))


def _canary(policy: Any, fleet: Any, shape: Any) -> float:
    from gpg_megatron.batching.updates import pack
    from gpg_megatron.loop.agreement import canary_sample
    from gpg_megatron.rollout.sampling import SamplingRequest
    from gpg_megatron.types import Prompt, SamplingParams

    prompts = [
        Prompt(
            id=f"canary/{i}",
            token_ids=np.array([(17 * i + 5 * j) % 250 for j in range(8 + i)], np.int32),
            messages=(),
            ground_truth="",
            data_source="canary",
        )
        for i in range(PROMPTS)
    ]
    params = SamplingParams(
        n=1, temperature=1.0, top_p=1.0, top_k=-1, max_tokens=ANSWER, stop=(), seed=0
    )
    requests = [SamplingRequest(prompt=p, params=params) for p in prompts]
    completions = _on0(lambda: fleet.generate(requests))
    samples = [canary_sample(p, c) for p, c in zip(prompts, completions, strict=True)]
    batch = pack(samples, [1.0] * len(samples))
    (logprobs,) = policy.logprobs([batch])
    return float((logprobs - batch.rollout_logprobs_T[batch.loss_mask_T]).abs().max())


def _on0(action: Callable[[], Any]) -> Any:
    from gpg_megatron.host.collectives import on_rank0

    return on_rank0(action)


def _calls(fleet: Any, method: str) -> list[float]:
    return [n for engine in fleet.call_workers(method, [()], timeout_s=60) for n in engine]


if __name__ == "__main__":
    sys.exit(main())
