"""Seconds, tokens/s and memory of one GPG update, and the same with each saving switched off.

    python -m benchmarks.policy [--model DIR] [--dead 0.5] [--repeats 3] ...

Every variant makes the same update from the same weights: loss, gradient norm and gradient are
compared. A plain padded Hugging Face implementation of the update is timed beside them. The
variants take turns, so that a busy machine slows all of them; medians are printed. Without
--model: random weights in a published shape. Last line: JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.machine import machine
from benchmarks.measure import Clock, PeakMemory
from benchmarks.plain_update import PlainUpdate
from benchmarks.policy_batches import (
    AGGREGATION,
    VARIANTS,
    Variant,
    make_batch,
    make_samples,
    sequence,
)
from gpg_megatron.algorithm.aggregation import aggregation_weights
from gpg_megatron.config.sections import (
    Config,
    ModelConfig,
    PolicyConfig,
    RolloutConfig,
    TrainerConfig,
)
from gpg_megatron.host.device import Device, backends, resolve_device, set_threads
from gpg_megatron.host.peak import peak_flops_per_s
from gpg_megatron.layout.hf_io import load_hf
from gpg_megatron.model.flops import token_costs
from gpg_megatron.model.shape import load_model_shape
from gpg_megatron.policy.on_cpu import quiet_megatron
from gpg_megatron.shapes import ModelShape
from gpg_megatron.types import DTYPES, TrainSample

TOLERANCE = {"fp32": 1e-4, "bf16": 0.25}
"""In bf16 rounding is most of it: gradients of SmolLM2 that should be one differ by an eighth."""
NO_LIMIT = 2**62
COMPARED = 2**24
"""Elements of the gradient that are compared, evenly over all of it."""

COMMON = {"tie_word_embeddings": True, "max_position_embeddings": 8192, "initializer_range": 0.04}
SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "rope_theta": 100000.0,
    },
    "qwen2.5-1.5b": {
        "model_type": "qwen2",
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "rope_theta": 1000000.0,
    },
}


def main() -> None:
    """Print the table."""
    options = _options()
    quiet_megatron()
    set_threads(options.threads)
    print(machine(), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        model = Path(options.model or _random_model(Path(folder), options))
        bench = Bench(options, model)
        rows = bench.run()
        peak = peak_flops_per_s(options.device, DTYPES[options.dtype])
    print(json.dumps(_summary(rows, options.device, peak)))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.policy", description=__doc__)
    parser.add_argument("--model", help="Hugging Face directory; default: random weights")
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m", help="if without one")
    parser.add_argument("--layers", type=int, help="of the random model, if fewer")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--samples", type=int, default=8, help="per prompt")
    parser.add_argument("--prompt-tokens", type=int, default=200)
    parser.add_argument("--response-tokens", type=int, default=64, help="of the longest response")
    parser.add_argument("--shortest", type=int, help="response; default: all equally long")
    parser.add_argument("--dead", type=float, default=0.5, help="share of the groups")
    parser.add_argument("--micro-batch-tokens", type=int, default=2112)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    options.device = resolve_device(options.device)
    return options


def _random_model(folder: Path, options: argparse.Namespace) -> Path:
    """A published shape, random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(1)
    layers = {"num_hidden_layers": options.layers} if options.layers else {}
    config = AutoConfig.for_model(**COMMON | SHAPES[options.shape] | layers)
    dtype = DTYPES[options.dtype]
    with torch.device(options.device):
        AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder)
    return folder


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One update of one variant."""

    seconds: float
    cpu_seconds: float
    """Of all threads: on a machine that others use, this says more than the clock."""
    n_tokens: int
    """That went through the network, in a pass with gradient."""
    peak_gb: float
    """Of the process; on a GPU of torch's allocator."""
    added_gb: float
    """The peak above what was held before the update."""
    flops: float = 0.0
    """Of the matrix products that the update needs; 0: not counted."""
    loss: float
    grad_norm: float
    gradient: torch.Tensor | None
    """A part of it, in one row; None for the plain implementation."""


class Bench:
    """The policy, the plain implementation, and the two batches."""

    def __init__(self, options: argparse.Namespace, model: Path) -> None:
        from gpg_megatron.policy.policy import Policy

        self.options = options
        self.device: Device = options.device
        self.limit = TOLERANCE[options.dtype]
        self.shape: ModelShape = load_model_shape(model)
        dist.init_process_group(backends(self.device), store=dist.HashStore(), rank=0, world_size=1)
        self.policy = Policy(_config(options, model), self.shape, device=self.device)
        load_hf(model, self.policy.named_shards(), self.shape, self.policy.position)
        self.policy.weights_loaded()
        self.weights = {name: x.clone() for name, x in self.policy.named_shards().items()}
        self.plain_path = model
        self.plain: PlainUpdate | None = None
        self.batches = {
            none_dead: make_samples(
                options, self.shape.vocab_size, 0.0 if none_dead else options.dead
            )
            for none_dead in (False, True)
        }

    def run(self) -> dict[str, list[Outcome]]:
        """The rounds, after an update that warms up. The table after each round is that of the
        medians so far."""
        self._policy(VARIANTS[0], self.batches[False])
        rows: dict[str, list[Outcome]] = {variant.name: [] for variant in VARIANTS}
        right: dict[bool, Outcome] = {}
        for _ in range(self.options.repeats):
            for variant in VARIANTS:
                outcome = self.update(variant)
                first = right.setdefault(variant.none_dead, outcome)
                same = _check(outcome, first, self.limit, math.log(self.shape.vocab_size))
                print(f"{variant.name}: {outcome.seconds:.2f} s, {same}", flush=True)
                rows[variant.name].append(replace(outcome, gradient=None))
            print(_table(rows), flush=True)
        return rows

    def update(self, variant: Variant) -> Outcome:
        """From the first weights; what prepares the update is not timed."""
        samples = self.batches[variant.none_dead]
        return self._plain(samples) if variant.plain else self._policy(variant, samples)

    def _plain(self, samples: Sequence[TrainSample]) -> Outcome:
        if self.plain is None:
            sequences = max(1, self.options.micro_batch_tokens // len(sequence(samples[0])))
            self.plain = PlainUpdate(
                self.plain_path, DTYPES[self.options.dtype], sequences, self.device
            )
            self._plain(self.batches[True][:sequences])
        self.plain.reset()
        weights = aggregation_weights(samples, AGGREGATION, self.options.response_tokens)
        with PeakMemory(self.device) as memory, Clock(self.device) as clock:
            loss, grad_norm = self.plain(samples, weights)
        longest = max(len(sequence(sample)) for sample in samples)
        return Outcome(
            seconds=clock.seconds,
            cpu_seconds=clock.cpu_seconds,
            n_tokens=longest * len(samples),
            peak_gb=memory.peak_gb,
            added_gb=memory.peak_gb - memory.before_gb,
            loss=loss,
            grad_norm=grad_norm,
            gradient=None,
        )

    def _policy(self, variant: Variant, samples: Sequence[TrainSample]) -> Outcome:
        policy: Any = self.policy
        for name, shard in policy.named_shards().items():
            shard.copy_(self.weights[name])
        policy.weights_loaded()
        batch = make_batch(variant, samples, self.options, token_costs(self.shape))
        (model,) = policy._models
        limit = model.logits_chunk_bytes
        with PeakMemory(self.device) as memory:
            model.logits_chunk_bytes = NO_LIMIT if variant.full_logits else limit
            with Clock(self.device) as clock:
                if variant.old_logprobs:
                    policy.logprobs(batch.micro_batches)
                result = policy.train(batch)
        model.logits_chunk_bytes = limit
        assert result.updated
        return Outcome(
            seconds=clock.seconds,
            cpu_seconds=clock.cpu_seconds,
            n_tokens=sum(len(mb.input_ids_T) for mb in batch.micro_batches),
            peak_gb=memory.peak_gb,
            added_gb=memory.peak_gb - memory.before_gb,
            loss=result.loss,
            grad_norm=result.grad_norm,
            gradient=_part_of_gradient(list(model.parameters())),
            flops=batch.flops,
        )


def _part_of_gradient(parameters: Sequence[Any]) -> torch.Tensor:
    """Every k-th element of each parameter's gradient, in one row."""
    k = max(1, sum(p.numel() for p in parameters) // COMPARED)
    return torch.cat([p.main_grad.flatten()[::k] for p in parameters])


def _check(outcome: Outcome, right: Outcome, limit: float, log_prob: float) -> str:
    """The relative differences between two updates that should be one; fails when they are not.

    Args:
        log_prob: size of a token's. The terms of the loss cancel; they are what it is a part of.
    """
    errors = {
        "loss": abs(outcome.loss - right.loss) / log_prob,
        "grad_norm": abs(outcome.grad_norm / right.grad_norm - 1.0),
    }
    if outcome.gradient is not None and right.gradient is not None:
        gap = (outcome.gradient - right.gradient).norm() / right.gradient.norm()
        errors["gradient"] = float(gap)
    assert max(errors.values()) < limit, f"another update: {errors}"
    return "differences " + ", ".join(f"{what} {error:.1e}" for what, error in errors.items())


def _config(options: argparse.Namespace, model: Path) -> Config:
    return Config(
        model=ModelConfig(path=str(model), dtype=options.dtype),
        policy=PolicyConfig(max_tokens_per_micro_batch=options.micro_batch_tokens),
        rollout=RolloutConfig(max_response_length=options.response_tokens),
        trainer=TrainerConfig(total_training_steps=1000, device=options.device),
    )


def _medians(rows: Mapping[str, list[Outcome]], field: str = "seconds") -> dict[str, float]:
    """Variant -> the median of a field."""
    return {name: median(getattr(o, field) for o in outcomes) for name, outcomes in rows.items()}


def _table(rows: Mapping[str, list[Outcome]]) -> str:
    seconds, cpu = _medians(rows), _medians(rows, "cpu_seconds")
    head = (
        "variant|seconds|CPU seconds|tokens computed|tokens/s|added memory, GB|times slower|by CPU"
    )
    lines = [f"| {head.replace('|', ' | ')} |", "|---" * (head.count("|") + 1) + "|"]
    for variant in VARIANTS:
        name, best = variant.name, "all savings, none dead" if variant.none_dead else "all savings"
        first, own = rows[name][0], seconds[name]
        lines.append(
            f"| {name} | {own:.2f} | {cpu[name]:.2f} | {first.n_tokens} "
            f"| {first.n_tokens / own:.0f} | {first.added_gb:.2f} "
            f"| {own / seconds[best]:.2f} | {cpu[name] / cpu[best]:.2f} |"
        )
    return "\n".join(lines)


def _summary(
    rows: Mapping[str, list[Outcome]], device: Device, peak_flops_per_s: float
) -> dict[str, float]:
    seconds = _medians(rows)
    ours, live = seconds["all savings"], seconds["all savings, none dead"]
    first = rows["all savings"][0]
    flops_per_s = rows["all savings, none dead"][0].flops / live
    memory = "peak_rss_gb" if device == "cpu" else "peak_gpu_gb"
    return {
        "mfu_none_dead": round(flops_per_s / peak_flops_per_s, 3),
        "tokens_per_s": round(first.n_tokens / ours, 1),
        memory: round(first.peak_gb, 2),
        "speedup_over_all_off": round(seconds["all off"] / ours, 2),
        "speedup_over_hf_padded": round(seconds["Hugging Face, padded"] / ours, 2),
        "speedup_over_hf_padded_none_dead": round(seconds["Hugging Face, none dead"] / live, 2),
    }


if __name__ == "__main__":
    main()
