"""What benchmarks.policy computes: the variants, random samples, and each variant's batch."""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import torch

from gpg_megatron.algorithm.aggregation import aggregation_weights
from gpg_megatron.batching.updates import BatchPlan, make_update, pack
from gpg_megatron.config.algorithm import AlgorithmConfig
from gpg_megatron.model.flops import TokenCosts
from gpg_megatron.types import MicroBatch, Tokens, TrainBatch, TrainSample

AGGREGATION: Final = "group-token-mean"


@dataclass(frozen=True, kw_only=True)
class Variant:
    """Which savings are off."""

    name: str
    padded: bool = False
    unshared: bool = False
    full_logits: bool = False
    dead: bool = False
    old_logprobs: bool = False
    none_dead: bool = False
    """Another batch: every group is live."""
    plain: bool = False
    """The Hugging Face implementation instead of the policy."""


VARIANTS = (
    Variant(name="all savings"),
    Variant(name="padded", padded=True),
    Variant(name="prompts not shared", unshared=True),
    Variant(name="full logits", full_logits=True),
    Variant(name="dead groups computed", dead=True),
    Variant(name="old log-prob pass", old_logprobs=True),
    Variant(
        name="all off", padded=True, unshared=True, full_logits=True, dead=True, old_logprobs=True
    ),
    Variant(name="all savings, none dead", none_dead=True),
    Variant(name="Hugging Face, padded", plain=True),
    Variant(name="Hugging Face, none dead", plain=True, none_dead=True),
)


def make_samples(options: argparse.Namespace, vocab_size: int, dead: float) -> list[TrainSample]:
    """Random tokens; the first groups are live, with as many right answers as wrong ones."""
    rng = random.Random(3)

    def tokens(n: int) -> Tokens:
        return np.array([rng.randrange(vocab_size) for _ in range(n)], np.int32)

    n_live = options.prompts - round(options.prompts * dead)
    shortest = options.shortest or options.response_tokens
    samples = []
    for group in range(options.prompts):
        prompt = tokens(options.prompt_tokens)
        for index in range(options.samples):
            n = rng.randint(shortest, options.response_tokens)
            samples.append(
                TrainSample(
                    prompt_id=f"random/{group}",
                    group=group,
                    index=index,
                    prompt_token_ids=prompt,
                    response_token_ids=tokens(n),
                    rollout_logprobs=np.full(n, -10.0, np.float32),
                    advantage=(0.5 if index % 2 else -0.5) if group < n_live else 0.0,
                    version=0,
                    live=group < n_live,
                    score=float(index % 2),
                )
            )
    return samples


def make_batch(
    variant: Variant,
    samples: Sequence[TrainSample],
    options: argparse.Namespace,
    costs: TokenCosts,
) -> TrainBatch:
    """The update of a variant over samples, on one rank."""
    share = not variant.unshared
    longest = max(len(sequence(sample)) for sample in samples)
    plan = BatchPlan(
        algorithm=AlgorithmConfig(loss_aggregation=AGGREGATION),
        n_updates=1,
        max_tokens=options.micro_batch_tokens,
        max_response_length=options.response_tokens,
        dp_rank=0,
        dp_size=1,
        costs=costs,
        share_prompts=share,
    )
    batch = make_update(samples, plan)
    micro_batches = list(batch.micro_batches)
    if variant.dead:
        micro_batches = _with_dead(samples, options, share)
    if variant.padded:
        micro_batches = [_padded(mb, longest) for mb in micro_batches]
    if variant.full_logits:
        everywhere = [torch.ones_like(mb.loss_mask_T) for mb in micro_batches]
        micro_batches = [
            replace(mb, loss_mask_T=mask)
            for mb, mask in zip(micro_batches, everywhere, strict=True)
        ]
    return replace(batch, micro_batches=tuple(micro_batches))


def sequence(sample: TrainSample) -> Tokens:
    return np.concatenate((sample.prompt_token_ids, sample.response_token_ids))


def _with_dead(
    samples: Sequence[TrainSample], options: argparse.Namespace, share: bool
) -> list[MicroBatch]:
    """Micro-batches of whole groups, or of as many sequences as fit, zero advantages included."""
    weights = aggregation_weights(samples, AGGREGATION, options.response_tokens)
    n = options.samples
    tokens = options.prompt_tokens + n * options.response_tokens if share else 0
    per_row = (
        n * max(1, options.micro_batch_tokens // tokens)
        if share
        else max(1, options.micro_batch_tokens // max(len(sequence(s)) for s in samples))
    )
    return [
        pack(samples[i : i + per_row], weights[i : i + per_row], share_prompts=share)
        for i in range(0, len(samples), per_row)
    ]


def _padded(mb: MicroBatch, longest: int) -> MicroBatch:
    """Every sequence of the row filled up to `longest` tokens with tokens that carry no loss."""
    bounds, prompts = mb.cu_seqlens_S1.tolist(), mb.prompt_S.tolist()
    sizes = [b - a for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
    fill = [
        0 if s in prompts else longest - sizes[s] - (sizes[prompts[s]] if prompts[s] >= 0 else 0)
        for s in range(len(sizes))
    ]

    def pad(values_T: torch.Tensor) -> torch.Tensor:
        parts = values_T.split(sizes)
        ends = (x.new_zeros(n, *x.shape[1:]) for x, n in zip(parts, fill, strict=True))
        return torch.cat([y for pair in zip(parts, ends, strict=True) for y in pair])

    total = [size + n for size, n in zip(sizes, fill, strict=True)]
    return replace(
        mb,
        **{name: pad(getattr(mb, name)) for name in mb.__dataclass_fields__ if name.endswith("_T")},
        cu_seqlens_S1=torch.tensor([0, *total]).cumsum(0).int(),
    )
