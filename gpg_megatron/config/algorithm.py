"""The section `algorithm`: the knobs of the objective, presets of them, what does not fit together.

A preset is a row of PRESETS: the defaults of the knobs that it names. Whatever the user sets
wins over it. The objective itself reads the knobs only, never the preset's name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from gpg_megatron.config.ranges import ranged


@dataclass(frozen=True, kw_only=True)
class AlgorithmConfig:
    """How rewards become a loss. docs/gpg.md has the formulas. The defaults are `paper`."""

    preset: Literal["paper", "amap", "verl", "grpo", "dr-grpo", "rloo", "reinforce++", "dapo"] = (
        "paper"
    )
    """Sets the defaults of the other keys, see docs/gpg.md; a key that is set wins."""

    loss: Literal["gpg", "clip"] = "gpg"
    """gpg: -log pi * A; clip: PPO's clipped surrogate."""
    clip_low: float = ranged(0.2, above=0, at_most=1)
    """The ratio is clipped from below at 1 - clip_low; read by loss: clip."""
    clip_high: float = ranged(0.2, above=0)
    """The ratio is clipped from above at 1 + clip_high; read by loss: clip."""
    old_logprobs: Literal["current", "policy", "rollout"] = "current"
    """The ratio's denominator, read by loss: clip. current: the log-probs of the update itself,
    so the ratio is 1; policy: of the policy before the first update of the rollout batch, by one
    more forward pass when there are several; rollout: of the engine."""

    baseline: Literal["group-mean", "leave-one-out", "batch-mean"] = "group-mean"
    """What is subtracted from a score: the mean of its group, the mean of the others in its
    group, the mean of the rollout batch."""
    f_norm: Literal["one", "std", "batch-std"] = "one"
    """Divisor of score - baseline: 1, or its standard deviation in the group or in the rollout
    batch."""
    f_norm_eps: float = ranged(1e-6, at_least=0)
    """Added to a standard deviation."""
    dead_by: str = "accuracy"
    """What decides that a group is dead: accuracy, score, or a part that the scorer names. none:
    no group is dead."""

    alpha: Literal["none", "group", "token", "nonzero"] = "group"
    """Correction for groups without gradient: none = 1; group = B / (B - M), samples over samples
    of live groups; token = the same in response tokens; nonzero = samples / samples with a score
    other than 0 (verl)."""
    alpha_scope: Literal["batch", "mini-batch", "micro-batch"] = "batch"
    """Over what alpha counts: the rollout batch, the optimizer step, or one micro-batch of all
    data-parallel ranks."""
    alpha_max: float = ranged(0.0, at_least=1, or_value=0)
    """Upper limit of alpha, which is 1 or more; 0: none."""

    loss_aggregation: Literal[
        "token-mean",
        "seq-mean-token-sum",
        "seq-mean-token-mean",
        "seq-mean-token-sum-norm",
        "group-token-mean",
        "micro-batch-token-mean",
    ] = "group-token-mean"

    beta_th: float = ranged(0.0, at_least=0, at_most=1)
    """Smallest share of live groups in a batch; more prompts are drawn until it is met.
    0 turns the rule off."""
    filter_groups: bool = False
    """Draw until the batch is full of live groups, and leave the dead ones out of it."""
    max_redraws: int = ranged(4, at_least=0)
    """Rounds of drawing more prompts in one step."""
    on_exhausted: Literal["train", "skip", "error"] = "train"
    """After max_redraws rounds: train on what there is, make no update and keep the live groups
    for the next step, or end the run."""

    correction: Literal[
        "none", "truncate-token", "truncate-sequence", "mask-token", "reject-sequence"
    ] = "none"
    """Weight of a token for having been sampled by another distribution, from the ratio policy /
    engine."""
    correction_min: float = ranged(0.5, above=0)
    """Smallest ratio that is kept; read by mask-token and reject-sequence."""
    correction_max: float = ranged(2.0, above=0)
    """Largest weight (truncate-*), or largest ratio that is kept (the others)."""

    kl_coef: float = ranged(0.0, at_least=0)
    """Of the KL term to the model that training began with; 0: off."""
    entropy_coef: float = ranged(0.0, at_least=0)
    """Of the entropy bonus; 0: off."""

    @property
    def wanted_fraction(self) -> float:
        """The share of a batch that has to be live before drawing ends."""
        return 1.0 if self.filter_groups else self.beta_th

    @property
    def needs_every_sample(self) -> bool:
        """Whether samples without advantage have a gradient all the same."""
        return self.kl_coef > 0.0 or self.entropy_coef > 0.0

    @property
    def is_weighted(self) -> bool:
        """Whether the policy's and the engine's log-probs are divided by each other."""
        return self.correction != "none" or (self.loss == "clip" and self.old_logprobs == "rollout")


_NO_DEAD_GROUPS: dict[str, Any] = {"dead_by": "none", "alpha": "none"}

# What differs from the defaults of AlgorithmConfig. Sources are in docs/gpg.md.
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "paper": {},
    "amap": {
        "dead_by": "score",
        "f_norm_eps": 1e-4,
        "alpha_scope": "micro-batch",
        "loss_aggregation": "micro-batch-token-mean",
        "beta_th": 0.5,
        "max_redraws": 20,
        "on_exhausted": "error",
    },
    "verl": {"dead_by": "none", "alpha": "nonzero", "loss_aggregation": "token-mean"},
    "grpo": _NO_DEAD_GROUPS
    | {"loss": "clip", "f_norm": "std", "loss_aggregation": "seq-mean-token-mean"},
    "dr-grpo": _NO_DEAD_GROUPS | {"loss": "clip", "loss_aggregation": "seq-mean-token-sum-norm"},
    "rloo": _NO_DEAD_GROUPS
    | {"baseline": "leave-one-out", "loss_aggregation": "seq-mean-token-sum"},
    "reinforce++": _NO_DEAD_GROUPS
    | {
        "loss": "clip",
        "baseline": "batch-mean",
        "f_norm": "batch-std",
        "f_norm_eps": 1e-8,
        "loss_aggregation": "token-mean",
    },
    "dapo": _NO_DEAD_GROUPS
    | {"loss": "clip", "clip_high": 0.28, "f_norm": "std", "loss_aggregation": "token-mean"},
}


def algorithm_rules(
    a: AlgorithmConfig, *, n_updates: int, truncates: bool, group_size: int
) -> Iterator[tuple[bool, str]]:
    """Rules about keys that do not fit together: whether one is broken, and the message.

    Args:
        n_updates: optimizer steps for each rollout batch.
        truncates: whether top_p or top_k cut the distribution that is sampled.
        group_size: answers to each prompt.
    """
    for rules in (_about_groups(a, group_size), _about_ratios(a, n_updates, truncates)):
        for broken, message in rules:
            yield broken, f"algorithm.{message}"


def _about_groups(a: AlgorithmConfig, group_size: int) -> Iterator[tuple[bool, str]]:
    none_is_dead = a.dead_by == "none"
    yield (
        a.beta_th > 0 and a.filter_groups,
        f"beta_th is {a.beta_th} and algorithm.filter_groups is true, which draws until every "
        "group is live; expected one of the two",
    )
    yield (
        none_is_dead and a.wanted_fraction > 0,
        f"{'filter_groups' if a.filter_groups else 'beta_th'} counts live groups, but "
        "algorithm.dead_by is none; expected accuracy, score or a part of the reward",
    )
    yield (
        none_is_dead and a.alpha in ("group", "token"),
        f"alpha={a.alpha} counts dead groups, but algorithm.dead_by is none; expected "
        "algorithm.alpha=none or nonzero",
    )
    needs_two = a.f_norm == "std" or a.baseline == "leave-one-out" or not none_is_dead
    yield (
        group_size == 1 and needs_two,
        "dead_by, baseline and f_norm need groups of two answers, but rollout.n is 1: a group "
        "of one carries no gradient; expected rollout.n of at least 2",
    )


def _about_ratios(
    a: AlgorithmConfig, n_updates: int, truncates: bool
) -> Iterator[tuple[bool, str]]:
    yield (
        a.is_weighted and truncates,
        f"{_ratio_key(a)} divides by the engine's log-probs, but rollout.top_p or rollout.top_k "
        "cut the distribution that they belong to; expected top_p=1 and top_k=-1",
    )
    yield (
        a.loss == "clip" and a.old_logprobs == "rollout" and a.correction != "none",
        f"correction={a.correction} repeats what algorithm.old_logprobs=rollout does: the ratio "
        "of the loss is already the engine's; expected correction=none or old_logprobs=policy",
    )
    yield (
        a.loss == "clip" and a.old_logprobs == "current" and n_updates > 1,
        f"old_logprobs=current makes every ratio 1, but there are {n_updates} optimizer steps "
        "for each rollout batch (trainer.mini_batch_size); expected policy (one more forward "
        "pass) or rollout (the engine's)",
    )
    yield (
        a.correction_min > a.correction_max,
        f"correction_min ({a.correction_min}) exceeds algorithm.correction_max "
        f"({a.correction_max}); expected at most correction_max",
    )


def _ratio_key(a: AlgorithmConfig) -> str:
    return "correction=" + a.correction if a.correction != "none" else "old_logprobs=rollout"


def warnings_about(a: AlgorithmConfig, *, n_updates: int, stale: bool) -> list[str]:
    """What is legal and yet likely not meant, one line each.

    Args:
        n_updates: optimizer steps for each rollout batch.
        stale: rollout batches are one step old.
    """
    remedy = "algorithm.correction=truncate-token corrects them"
    if stale and not a.is_weighted:
        return [
            "trainer.max_staleness=1 makes every rollout batch one step old, and no ratio weighs "
            f"its samples; {remedy}"
        ]
    if a.loss == "gpg" and a.correction == "none" and n_updates > 1:
        return [
            f"algorithm.loss=gpg has no ratio, and there are {n_updates} optimizer steps for each "
            "rollout batch (trainer.mini_batch_size): those after the first are off-policy and "
            f"not corrected; {remedy}"
        ]
    return []
