"""How answers that other weights sampled are weighed, and which are left: algorithm.correction,
old_logprobs and target_kl, where they are left to auto, and what does not fit together in them.

| loss | the answers are | correction | old_logprobs |
|---|---|---|---|
| gpg | of the present weights only | none | current |
| gpg | learned from twice, or older | truncate-token | rollout |
| gpg | learned from twice, none older; engines compute in another type | truncate-token | policy |
| gpg | learned from twice; top_p or top_k | truncate-token | policy |
| gpg | older only; top_p or top_k | none | current |
| clip, clip-sequence | of the present weights only | none | current |
| clip | learned from twice | none | policy |
| clip | older, no top_p or top_k | none | rollout |

target_kl, left to auto, is TARGET_KL where a correction stands beside loss=gpg; else 0.

With top_p or top_k the engine's log-probs are those of a cut distribution: no ratio can be made,
and target_kl is 0.
"Learned from twice": a rollout batch makes several updates, so the second one is off-policy.
"Older": trainer.max_staleness, or groups carried from one batch to the next.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from gpg_megatron.config.algorithm import AlgorithmConfig

Correction = Literal["none", "truncate-token"]
Old = Literal["current", "policy", "rollout"]
TARGET_KL = 0.05
"""Nats per token. docs/gpg.md has what it was chosen by."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """What decides how far the policy may be from what sampled its answers."""

    n_updates: int
    """Optimizer steps for each rollout batch."""
    stale: bool
    """Rollout batches may be older than the weights (trainer.max_staleness)."""
    carried: bool
    """Groups may be carried from one batch to the next (beta_th, filter_groups)."""
    truncated: bool
    """top_p or top_k cut the distribution that is sampled."""
    other_type: bool
    """The engines compute in another type than the policy."""

    @property
    def older(self) -> bool:
        return self.stale or self.carried

    @property
    def why(self) -> str:
        """What makes answers off-policy, in words; empty: nothing does."""
        reasons = [
            f"{self.n_updates} updates for each rollout batch" if self.n_updates > 1 else "",
            "batches of older weights" if self.stale else "",
            "groups carried from batch to batch" if self.carried else "",
        ]
        return ", ".join(filter(None, reasons))


def settled(a: AlgorithmConfig, s: Sampled) -> AlgorithmConfig:
    """The section with nothing left to auto. What the user set stays."""
    correction = _correction(a, s) if a.correction == "auto" else a.correction
    a = replace(a, correction=correction)
    if a.target_kl is None:
        off_policy = bool(s.why) and not (a.clips or s.truncated or correction == "none")
        a = replace(a, target_kl=TARGET_KL if off_policy else 0.0)
    return replace(a, old_logprobs=_old(a, s)) if a.old_logprobs == "auto" else a


def _correction(a: AlgorithmConfig, s: Sampled) -> Correction:
    nothing_to_divide_by = s.truncated and s.n_updates == 1
    if a.clips or not s.why or nothing_to_divide_by or a.old_logprobs == "current":
        return "none"
    return "truncate-token"


def _old(a: AlgorithmConfig, s: Sampled) -> Old:
    """Of a section whose correction is settled."""
    if a.clips:
        if s.older and not s.truncated and a.correction == "none":
            return "rollout"
        return "policy" if s.n_updates > 1 else "current"
    if a.correction == "none":
        return "current"
    only_updates = s.n_updates > 1 and not s.older
    return "policy" if s.truncated or (only_updates and s.other_type) else "rollout"


def summary(a: AlgorithmConfig, s: Sampled) -> str:
    """One line: how off-policy answers are weighed, and why. a: settled."""
    if not s.why and a.correction == "none":
        return "off-policy correction: none, every answer is of the present weights"
    over = {
        "current": "",
        "policy": " against the policy's log-probs before the batch",
        "rollout": " against the engines' log-probs",
    }[a.old_logprobs]
    what = "clipped ratio" if a.clips and a.correction == "none" else a.correction
    limit = f", no update beyond {a.target_kl:g} nats" if a.target_kl else ""
    return f"off-policy correction: {what}{over}{limit} ({s.why or 'asked for'})"


def rules(a: AlgorithmConfig, s: Sampled) -> Iterator[tuple[bool, str]]:
    """Rules about keys that do not fit together, of a settled section: whether one is broken, and
    the message without "algorithm."."""
    # Beside a clipped loss a correction divides old_logprobs by the engine's, whatever they are.
    beside = a.clips and a.correction != "none"
    remedy = "algorithm.correction=none" if beside else "algorithm.old_logprobs=policy"
    yield (
        s.truncated and (beside or (a.has_ratio and a.old_logprobs == "rollout")),
        f"{_ratio_key(a)} divides by the engine's log-probs, but rollout.top_p or rollout.top_k "
        f"cut the distribution that they belong to; expected top_p=1 and top_k=-1, or {remedy}",
    )
    yield (
        beside and a.old_logprobs == "rollout",
        f"correction={a.correction} repeats what algorithm.old_logprobs=rollout does: the ratio "
        "of the loss is already the engine's; expected correction=none or old_logprobs=policy",
    )
    yield (
        a.has_ratio and a.old_logprobs == "current" and (s.n_updates > 1 or not a.clips),
        f"old_logprobs=current makes every ratio 1, but there are {s.n_updates} optimizer steps "
        "for each rollout batch (trainer.mini_batch_size); expected policy (one more forward "
        "pass) or rollout (the engine's)"
        if a.clips
        else f"correction={a.correction} has nothing to divide by with algorithm.old_logprobs="
        "current; expected rollout (the engine's) or policy (one more forward pass)",
    )
    yield (
        bool(a.target_kl) and s.truncated,
        f"target_kl={a.target_kl} measures how far the policy is from the engine's log-probs, but "
        "rollout.top_p or rollout.top_k cut the distribution that they belong to; expected "
        "top_p=1 and top_k=-1, or target_kl=0",
    )
    yield (
        a.correction_min > a.correction_max,
        f"correction_min ({a.correction_min}) exceeds algorithm.correction_max "
        f"({a.correction_max}); expected at most correction_max",
    )


def _ratio_key(a: AlgorithmConfig) -> str:
    return "correction=" + a.correction if a.correction != "none" else "old_logprobs=rollout"


def warnings_about(a: AlgorithmConfig, s: Sampled) -> list[str]:
    """What is legal and yet likely not meant, one line each. a: settled."""
    by_rollout = a.is_weighted and a.old_logprobs == "rollout"
    if s.stale and not by_rollout:
        remedy = (
            "with rollout.top_p or top_k nothing can"
            if s.truncated
            else "algorithm.correction=auto corrects them"
        )
        return [
            "trainer.max_staleness lets rollout batches be of older weights, and no ratio weighs "
            f"their samples; {remedy}"
        ]
    if not a.clips and a.correction == "none" and s.n_updates > 1:
        return [
            f"algorithm.loss=gpg has no ratio, and there are {s.n_updates} optimizer steps for "
            "each rollout batch (trainer.mini_batch_size): those after the first are off-policy "
            "and not corrected; algorithm.correction=auto corrects them"
        ]
    return []
