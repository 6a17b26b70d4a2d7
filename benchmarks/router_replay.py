"""How far a policy with experts is from its engine, with and without router replay.

    python -m benchmarks.router_replay [--model DIR] [--text FILE [--train STEPS]] [--dtype ...] ...

A real engine answers prompts and says where it sent its tokens; a policy with the same weights
computes their log-probs with the engine's experts and with its own. The prompts are pieces of FILE,
or random tokens. Without --model: a Qwen3-MoE with 64 experts, 8 for each token, of random weights
or trained to continue FILE. On CPU. Last line: JSON.

    with_mean, with_max        of |policy - engine| over the response tokens, nats
    without_mean, without_max  the same with the policy's own experts
    differs                    share of the engine's choices that the policy would not make
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from gpg_megatron.batching.updates import pack
from gpg_megatron.bridge.protocol import BACKEND, RECEIVER
from gpg_megatron.config.sections import (
    Config,
    ModelConfig,
    PolicyConfig,
    RolloutConfig,
    TrainerConfig,
)
from gpg_megatron.host.reaper import cleanup_run, new_run_id, scratch_directory, start_reaper
from gpg_megatron.loop.agreement import canary_sample
from gpg_megatron.model.shape import load_model_shape
from gpg_megatron.rollout.fleet import Fleet
from gpg_megatron.rollout.sampling import SamplingRequest
from gpg_megatron.rollout.spec import EngineSpec
from gpg_megatron.types import (
    NO_ROUTING,
    Prompt,
    SamplingParams,
    TrainBatch,
    TrainSample,
)

Dtype = Literal["fp32", "bf16"]
LENGTHS = (8, 48)
"""Tokens of a prompt, at least and at most."""
PIECE, PIECES = 64, 16
"""Tokens of a piece and pieces of a batch, in training."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--train", type=int, default=0, metavar="STEPS")
    parser.add_argument("--dtype", default="bf16", choices=("fp32", "bf16"))
    parser.add_argument("--engine-dtype", default="bf16", choices=("fp32", "bf16"))
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64)
    args = parser.parse_args(argv)
    if args.train and not args.text:
        parser.error("--train needs --text")
    with tempfile.TemporaryDirectory() as folder:
        model = args.model or make_model(Path(folder), args.text, args.train)
        samples = answers(
            model,
            make_prompts(model, args.text, args.prompts),
            dtype=args.engine_dtype,
            n=args.samples,
            max_tokens=args.tokens,
        )
        with one_policy(model, args.dtype) as policy:
            report = compare(policy, samples)
    print(json.dumps(report))
    return 0


def make_model(folder: Path, text: Path | None, steps: int) -> Path:
    """Of random weights its log-probs are about as sharp as those of a trained model."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    from gpg_megatron.demo.model import build_tokenizer

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=4096,
        hidden_size=256,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        moe_intermediate_size=128,
        num_experts=64,
        num_experts_per_tok=8,
        norm_topk_prob=True,
        max_position_embeddings=512,
        initializer_range=0.05,
        tie_word_embeddings=False,
    )
    network = Qwen3MoeForCausalLM(config)
    lines = text.read_text().splitlines() if text else ["the quick brown fox"]
    tokenizer = build_tokenizer(lines, 4096 if steps else 300)
    if steps:
        assert text is not None
        train(network, tokenizer.encode(text.read_text()), steps)
    else:
        network.model.norm.weight.data *= 3.0
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def train(network: Any, row: Sequence[int], steps: int) -> None:
    """To continue pieces of the row, with the loss that keeps its experts at about equal loads."""
    rng = random.Random(0)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    losses = []
    for _ in range(steps):
        begins = [rng.randrange(len(row) - PIECE) for _ in range(PIECES)]
        ids = torch.tensor([row[begin : begin + PIECE] for begin in begins])
        answer = network(input_ids=ids, labels=ids, output_router_logits=True)
        answer.loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(answer.loss.item())
    print(f"trained for {steps} steps: loss {losses[0]:.2f} -> {sum(losses[-10:]) / 10:.2f}")


def make_prompts(model: Path, text: Path | None, n: int) -> list[Prompt]:
    """Pieces of the text at random places, or random tokens."""
    import numpy as np
    from transformers import AutoTokenizer

    rng = random.Random(0)
    if text is not None:
        row = AutoTokenizer.from_pretrained(model).encode(text.read_text())
    else:
        row = [rng.randrange(load_model_shape(model).vocab_size) for _ in range(10_000)]
    prompts = []
    for i in range(n):
        length = rng.randint(*LENGTHS)
        begin = rng.randrange(len(row) - length)
        ids = np.array(row[begin : begin + length], np.int32)
        prompts.append(
            Prompt(id=f"p/{i}", token_ids=ids, messages=(), ground_truth="", data_source="p")
        )
    return prompts


def answers(
    model: Path, prompts: Sequence[Prompt], *, dtype: Dtype, n: int, max_tokens: int
) -> list[TrainSample]:
    """What an engine samples, group by group, with the experts of its tokens."""
    run_id = new_run_id()
    start_reaper(run_id)
    try:
        spec = EngineSpec(
            rollout=RolloutConfig(
                dtype=dtype, kv_cache_gb=0.25, enforce_eager=True, router_replay=True
            ),
            model_path=str(model.absolute()),
            device="cpu",
            max_model_len=LENGTHS[1] + max_tokens,
            max_num_seqs=64,
            max_num_batched_tokens=8192,
            worker_extension=RECEIVER,
            weight_transfer=BACKEND,
            scratch=scratch_directory(run_id),
        )
        params = SamplingParams(
            n=n, temperature=1.0, top_p=1.0, top_k=-1, max_tokens=max_tokens, stop=(), seed=1
        )
        requests = [SamplingRequest(prompt=p, params=params, with_routing=True) for p in prompts]
        fleet = Fleet.start(spec, run_id=run_id, log_dir=spec.scratch)
        fleet.wait_ready()
        completions = iter(fleet.generate(requests))
        fleet.close()
        return [
            replace(canary_sample(prompt, next(completions)), group=group, index=index)
            for group, prompt in enumerate(prompts)
            for index in range(n)
        ]
    finally:
        cleanup_run(run_id)


@contextmanager
def one_policy(model: Path, dtype: Dtype) -> Iterator[Any]:
    """On one rank, in this process."""
    import torch.distributed as dist

    from gpg_megatron.host.device import init_process_group, set_threads
    from gpg_megatron.host.network import free_port
    from gpg_megatron.layout.hf_io import load_hf
    from gpg_megatron.policy.on_cpu import quiet_megatron

    quiet_megatron()
    from gpg_megatron.policy.policy import Policy

    own = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    os.environ |= own | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    set_threads(None)
    init_process_group("cpu", 120)
    config = Config(
        model=ModelConfig(path=str(model), dtype=dtype),
        policy=PolicyConfig(lr=1e-9),
        rollout=RolloutConfig(router_replay=True),
        trainer=TrainerConfig(device="cpu"),
    )
    shape = load_model_shape(model)
    policy = Policy(config, shape, "cpu")
    load_hf(model, policy.named_shards(), shape, policy.position)
    policy.weights_loaded()
    yield policy
    dist.destroy_process_group()


def logprobs(policy: Any, samples: Sequence[TrainSample]) -> torch.Tensor:
    """[response tokens of all samples], in their order; what shares a prompt computes it once."""
    return torch.cat(policy.logprobs([pack(samples, [1.0] * len(samples), share_prompts=True)]))


def compare(policy: Any, samples: Sequence[TrainSample]) -> dict[str, float]:
    """The report."""
    engine = torch.cat([torch.from_numpy(sample.rollout_logprobs) for sample in samples])
    bare = [replace(sample, routing=NO_ROUTING) for sample in samples]
    report: dict[str, float] = {"tokens": len(engine)}
    for name, given in (("with", samples), ("without", bare)):
        gaps = (logprobs(policy, given) - engine).abs()
        report |= {f"{name}_mean": gaps.mean().item(), f"{name}_max": gaps.max().item()}
    return report | {"differs": update(policy, samples)["policy/routing_differs"]}


def update(policy: Any, samples: Sequence[TrainSample]) -> dict[str, float]:
    """The metrics of an update that hardly changes the policy."""
    batch = TrainBatch(
        micro_batches=(pack(samples, [1e-3] * len(samples), share_prompts=True),),
        n_computed_tokens=0,
        n_skipped_tokens=0,
        n_shared_tokens=0,
        n_loss_tokens=0,
        unrouted=0.0,
        flops=0.0,
        alpha=1.0,
        whole_alpha=1.0,
    )
    return dict(policy.train(batch).metrics)


if __name__ == "__main__":
    raise SystemExit(main())
