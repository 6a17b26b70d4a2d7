"""The section `algorithm`: the knobs of the objective, presets of them, what does not fit together.

A preset is a row of PRESETS: the defaults of the knobs that it names. Whatever the user sets
wins over it. The objective itself reads the knobs only, never the preset's name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Optional

from gpg_megatron.config.ranges import ranged


@dataclass(frozen=True, kw_only=True)
class AlgorithmConfig:
    """How rewards become a loss. docs/gpg.md has the formulas. The defaults are `paper`."""

    preset: Literal[
        "paper",
        "amap",
        "verl",
        "grpo",
        "dr-grpo",
        "dapo",
        "gspo",
        "cispo",
        "rloo",
        "rgra",
        "maxrl",
        "reinforce++",
        "reinforce++-baseline",
    ] = "paper"
    """Sets the defaults of the other keys, see docs/gpg.md; a key that is set wins."""

    loss: Literal["gpg", "clip", "clip-sequence"] = "gpg"
    """gpg: -log pi * A; clip: PPO's clipped surrogate; clip-sequence: the same with one ratio for
    each response, the geometric mean of its tokens'."""
    clip_low: float = ranged(0.2, above=0, at_most=1)
    """The ratio is clipped from below at 1 - clip_low; read by the clipped losses."""
    clip_high: float = ranged(0.2, above=0)
    """The ratio is clipped from above at 1 + clip_high; read by the clipped losses."""
    old_logprobs: Literal["auto", "current", "policy", "rollout"] = "auto"
    """The denominator of the ratio, which the clipped losses and a correction have. current: the
    log-probs of the update itself, so the ratio is 1; policy: of the policy before the first update
    of the rollout batch, by one more forward pass when there are several; rollout: of the engine;
    auto: by the table of off_policy.py."""

    baseline: Literal["group-mean", "leave-one-out", "batch-mean", "min-variance"] = "group-mean"
    """What is subtracted from a score: the mean of its group, the mean of the others in its
    group, the mean of the rollout batch, the mean of the others by their tokens."""
    f_norm: Literal["one", "std", "mean", "batch-std", "token-whiten"] = "one"
    """Divisor of score - baseline: 1; its standard deviation in the group or in the rollout batch;
    the group's mean score. token-whiten: less its mean over the response tokens of the batch,
    over the standard deviation there."""
    f_norm_eps: float = ranged(1e-6, at_least=0)
    """Added to a standard deviation; to the variance with token-whiten."""
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
    alpha_apply: Literal["loss", "step"] = "loss"
    """What alpha multiplies: the loss, or the update of the weights after clipping and Adam."""
    alpha_effective_freq: int = ranged(0, at_least=0)
    """Every N optimizer steps group/alpha_effective is measured; 0: never."""

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
        "auto", "none", "truncate-token", "truncate-sequence", "mask-token", "reject-sequence"
    ] = "auto"
    """Weight of a token for having been sampled by another distribution, from the ratio policy /
    old_logprobs. auto: none where every answer is of the present weights, else truncate-token,
    see off_policy.py."""
    correction_min: float = ranged(0.5, above=0)
    """Smallest ratio that is kept; read by mask-token and reject-sequence."""
    correction_max: float = ranged(2.0, above=0)
    """Largest weight (truncate-*), or largest ratio that is kept (the others)."""
    ess_lr: bool = False
    """The learning rate of an optimizer step is multiplied by correction/ess."""
    target_kl: Optional[float] = ranged(None, at_least=0)
    """Nats per token: the first update of a rollout batch whose answers the policy has left farther
    behind than this (mismatch/kl_k3), and those after it, are not made; 0: all are; null: by
    off_policy.py."""

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
    def clips(self) -> bool:
        """Whether the loss has a ratio, which it clips."""
        return self.loss != "gpg"

    @property
    def has_ratio(self) -> bool:
        """Whether anything is divided by old_logprobs: the loss, or a correction beside it."""
        return self.clips or self.correction != "none"

    @property
    def is_weighted(self) -> bool:
        """Whether the ratio weighs off-policy answers, beside or instead of clipping them."""
        return self.correction != "none" or (self.clips and self.old_logprobs == "rollout")

    @property
    def needs_old_policy(self) -> bool:
        """Whether the policy's log-probs before the first update of a rollout batch are read."""
        return self.has_ratio and self.old_logprobs == "policy"


_EQUAL_IN_GROUP = (
    "token-mean",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
    "group-token-mean",
)
"""Aggregations that give every token of a group the same weight."""
_NO_DEAD_GROUPS: dict[str, Any] = {"dead_by": "none", "alpha": "none"}
_TOKEN_WHITENED: dict[str, Any] = {
    "loss": "clip",
    "f_norm": "token-whiten",
    "f_norm_eps": 1e-8,
    "loss_aggregation": "token-mean",
}

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
    "verl": {
        "dead_by": "none",
        "alpha": "nonzero",
        "loss_aggregation": "token-mean",
        "correction": "none",
    },
    "grpo": _NO_DEAD_GROUPS
    | {"loss": "clip", "f_norm": "std", "loss_aggregation": "seq-mean-token-mean"},
    "dr-grpo": _NO_DEAD_GROUPS | {"loss": "clip", "loss_aggregation": "seq-mean-token-sum-norm"},
    "dapo": _NO_DEAD_GROUPS
    | {"loss": "clip", "clip_high": 0.28, "f_norm": "std", "loss_aggregation": "token-mean"},
    "gspo": _NO_DEAD_GROUPS
    | {
        "loss": "clip-sequence",
        "clip_low": 3e-4,
        "clip_high": 4e-4,
        "f_norm": "std",
        "loss_aggregation": "seq-mean-token-mean",
    },
    "cispo": _NO_DEAD_GROUPS
    | {
        "correction": "truncate-token",
        "correction_max": 5.0,
        "target_kl": 0.0,
        "f_norm": "std",
        "loss_aggregation": "token-mean",
    },
    "rloo": _NO_DEAD_GROUPS
    | {"baseline": "leave-one-out", "loss_aggregation": "seq-mean-token-sum"},
    "rgra": _NO_DEAD_GROUPS | {"f_norm": "std", "loss_aggregation": "seq-mean-token-mean"},
    "maxrl": _NO_DEAD_GROUPS | {"f_norm": "mean", "loss_aggregation": "token-mean"},
    "reinforce++": _NO_DEAD_GROUPS | _TOKEN_WHITENED | {"baseline": "batch-mean"},
    "reinforce++-baseline": _NO_DEAD_GROUPS | _TOKEN_WHITENED,
}


def group_rules(a: AlgorithmConfig, *, group_size: int) -> Iterator[tuple[bool, str]]:
    """Rules about keys that do not fit together: whether one is broken, and the message without
    "algorithm.". group_size: answers to each prompt."""
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
    of_others = a.baseline in ("leave-one-out", "min-variance")
    needs_two = a.f_norm == "std" or of_others or not none_is_dead
    yield (
        group_size == 1 and needs_two,
        "dead_by, baseline and f_norm need groups of two answers, but rollout.n is 1: a group "
        "of one carries no gradient; expected rollout.n of at least 2",
    )


def update_rules(a: AlgorithmConfig) -> Iterator[tuple[bool, str]]:
    """The same about what is made of an update, of a section with nothing left to auto."""
    yield (
        a.baseline == "min-variance" and (a.has_ratio or a.loss_aggregation not in _EQUAL_IN_GROUP),
        "baseline=min-variance is exact for the plain policy gradient only, whose tokens weigh "
        f"alike within a group; expected algorithm.loss=gpg ({a.loss}), correction=none "
        f"({a.correction}) and loss_aggregation one of {', '.join(_EQUAL_IN_GROUP)} "
        f"({a.loss_aggregation}), or baseline=leave-one-out",
    )
    yield (
        a.ess_lr and not a.is_weighted,
        "ess_lr is true, but no ratio weighs the answers, so that correction/ess is not measured; "
        f"expected a correction (algorithm.correction is {a.correction}), or false",
    )
    not_a_factor = (
        "algorithm.alpha_scope=micro-batch, where alpha is no single factor"
        if a.alpha_scope == "micro-batch"
        else "algorithm.kl_coef or algorithm.entropy_coef, which alpha leaves alone"
    )
    for asked, what, remedy in (
        (a.alpha_apply == "step", "alpha_apply=step scales the whole update", "loss"),
        (a.alpha_effective_freq > 0, "alpha_effective_freq divides the gradient by alpha", "0"),
    ):
        yield (
            asked and (a.alpha_scope == "micro-batch" or a.needs_every_sample),
            f"{what}, but there is {not_a_factor}; expected {remedy}",
        )
