"""What corrects off-policy answers where the user leaves it to the product."""

from __future__ import annotations

import itertools

import pytest

from gpg_megatron.config.algorithm import PRESETS, AlgorithmConfig
from gpg_megatron.config.off_policy import (
    TARGET_KL,
    Sampled,
    rules,
    settled,
    summary,
    warnings_about,
)
from tests.presets import ON_POLICY, as_written

EVERY = [
    Sampled(n_updates=n, stale=stale, carried=carried, truncated=truncated, other_type=other)
    for n, (stale, carried, truncated, other) in itertools.product(
        (1, 4), itertools.product((False, True), repeat=4)
    )
]


def facts(**changes: bool | int) -> Sampled:
    whole = {name: getattr(ON_POLICY, name) for name in ON_POLICY.__slots__}
    return Sampled(**whole | changes)


@pytest.mark.parametrize(
    ("loss", "changes", "correction", "old"),
    [
        ("gpg", {}, "none", "current"),
        ("gpg", {"other_type": True}, "none", "current"),
        ("gpg", {"truncated": True}, "none", "current"),
        ("gpg", {"n_updates": 4}, "truncate-token", "rollout"),
        ("gpg", {"stale": True}, "truncate-token", "rollout"),
        ("gpg", {"carried": True}, "truncate-token", "rollout"),
        ("gpg", {"n_updates": 4, "other_type": True}, "truncate-token", "policy"),
        ("gpg", {"stale": True, "other_type": True}, "truncate-token", "rollout"),
        ("gpg", {"n_updates": 4, "truncated": True}, "truncate-token", "policy"),
        ("gpg", {"stale": True, "truncated": True}, "none", "current"),
        ("clip", {}, "none", "current"),
        ("clip", {"n_updates": 4}, "none", "policy"),
        ("clip", {"stale": True}, "none", "rollout"),
        ("clip", {"n_updates": 4, "carried": True}, "none", "rollout"),
        ("clip", {"stale": True, "truncated": True}, "none", "current"),
    ],
)
def test_the_table(loss: str, changes: dict[str, bool | int], correction: str, old: str) -> None:
    config = settled(AlgorithmConfig(loss=loss), facts(**changes))  # type: ignore[arg-type]
    assert (config.correction, config.old_logprobs) == (correction, old)
    limits_kl = correction != "none" and not changes.get("truncated")
    assert config.target_kl == (TARGET_KL if limits_kl else 0.0)


def test_a_target_kl_that_is_asked_for_is_kept_where_it_can_be_measured() -> None:
    for sampled in EVERY:
        config = settled(AlgorithmConfig(target_kl=0.2), sampled)
        assert config.target_kl == 0.2
        broken = [message for is_broken, message in rules(config, sampled) if is_broken]
        assert [x.partition("=")[0] for x in broken] == ["target_kl"] * sampled.truncated


@pytest.mark.parametrize("name", PRESETS)
def test_no_default_breaks_a_rule_and_none_is_left_to_auto(name: str) -> None:
    for sampled in EVERY:
        config = settled(as_written(name), sampled)
        broken = [message for is_broken, message in rules(config, sampled) if is_broken]
        assert broken == [], sampled
        assert "auto" not in (config.correction, config.old_logprobs)
        assert settled(config, sampled) == config


@pytest.mark.parametrize("correction", ["truncate-sequence", "mask-token", "reject-sequence"])
@pytest.mark.parametrize("name", PRESETS)
def test_a_correction_that_is_asked_for_is_kept_and_has_a_ratio(name: str, correction: str) -> None:
    for sampled in EVERY:
        config = settled(as_written(name, correction=correction), sampled)
        assert config.correction == correction
        assert config.clips or config.old_logprobs in ("policy", "rollout")
        broken = [message for is_broken, message in rules(config, sampled) if is_broken]
        # Beside a clipped loss it divides by the engine's log-probs.
        assert bool(broken) == (config.clips and sampled.truncated), sampled
        assert all(
            "expected top_p=1 and top_k=-1, or algorithm.correction=none" in x for x in broken
        )


@pytest.mark.parametrize("name", PRESETS)
def test_only_what_verl_does_or_truncation_hides_is_left_uncorrected(name: str) -> None:
    for sampled in EVERY:
        warned = bool(warnings_about(settled(as_written(name), sampled), sampled))
        blind = sampled.stale and sampled.truncated
        uncorrected = name == "verl" and (sampled.n_updates > 1 or sampled.stale)
        assert warned == (blind or uncorrected), sampled


def test_the_summary_says_which_and_why() -> None:
    def said(**changes: bool | int) -> str:
        return summary(settled(AlgorithmConfig(), facts(**changes)), facts(**changes))

    assert said() == "off-policy correction: none, every answer is of the present weights"
    assert said(n_updates=4) == (
        "off-policy correction: truncate-token against the engines' log-probs, no update beyond "
        "0.05 nats (4 updates for each rollout batch)"
    )
    assert said(n_updates=2, truncated=True, carried=True) == (
        "off-policy correction: truncate-token against the policy's log-probs before the batch "
        "(2 updates for each rollout batch, groups carried from batch to batch)"
    )
