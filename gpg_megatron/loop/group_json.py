"""Scored groups as plain JSON and back: a checkpoint keeps those that were carried over."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from gpg_megatron.types import Completion, Prompt, Reward, ScoredGroup, VersionSpan


def to_json(group: ScoredGroup) -> dict[str, Any]:
    """Objects, lists, texts and numbers; floats survive json exactly."""
    return dataclasses.asdict(group)


def from_json(data: Mapping[str, Any]) -> ScoredGroup:
    """What to_json was given."""
    prompt = data["prompt"]
    return ScoredGroup(
        prompt=Prompt(
            **prompt
            | {"token_ids": tuple(prompt["token_ids"]), "messages": tuple(prompt["messages"])}
        ),
        completions=tuple(_completion(completion) for completion in data["completions"]),
        rewards=tuple(Reward(**reward) for reward in data["rewards"]),
    )


def _completion(data: Mapping[str, Any]) -> Completion:
    return Completion(
        **dict(data)
        | {
            "token_ids": tuple(data["token_ids"]),
            "logprobs": tuple(data["logprobs"]),
            "versions": tuple(VersionSpan(**span) for span in data["versions"]),
        }
    )
