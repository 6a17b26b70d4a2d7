"""Scored groups as three flat arrays and a text, and back: for the other ranks, and in checkpoints.

tokens    | prompt 0 | answer 0 | answer 1 | ... | prompt 1 | answer 0 | ...    int32
logprobs  |            answer 0 | answer 1 | ... |            answer 0 | ...    float32
experts   | prompt 0 | answer 0 | answer 1 | ... | prompt 1 | answer 0 | ...    uint8 or uint16
text      all the rest as JSON, in which each array is its length; floats survive it exactly
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from gpg_megatron.types import (
    NO_ROUTING,
    Completion,
    Experts,
    LogProbs,
    Prompt,
    Reward,
    Routing,
    ScoredGroup,
    Tokens,
    VersionSpan,
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FlatGroups:
    """Any number of groups."""

    text: str
    """ASCII."""
    tokens: Tokens
    logprobs: LogProbs
    experts: Experts
    """[rows, layers, experts per token], no row for what is not known."""

    @property
    def arrays(self) -> tuple[Tokens, LogProbs, Experts]:
        """Those that need no JSON."""
        return self.tokens, self.logprobs, self.experts


def flatten(groups: Iterable[ScoredGroup], *, with_texts: bool = True) -> FlatGroups:
    """A copy. extra_info and parts must be plain JSON.

    Args:
        with_texts: False: messages and texts, which the policy does not learn from, are empty.
    """
    tokens: list[Tokens] = [np.empty(0, np.int32)]
    logprobs: list[LogProbs] = [np.empty(0, np.float32)]
    experts: list[Experts] = []
    rows = []
    for group in groups:
        tokens += [group.prompt.token_ids, *(c.token_ids for c in group.completions)]
        logprobs += [c.logprobs for c in group.completions]
        shared = group.completions[0].routing.prompt
        experts += [shared, *(c.routing.response for c in group.completions)]
        prompt = _fields(group.prompt, token_ids=len(group.prompt.token_ids))
        completions = list(map(_completion_row, group.completions))
        if not with_texts:
            prompt["messages"] = ()
            for row in completions:
                row["text"] = ""
        rewards = list(map(_fields, group.rewards))
        rows.append(
            {
                "prompt": prompt,
                "routing": len(shared),
                "completions": completions,
                "rewards": rewards,
            }
        )
    return FlatGroups(
        text=json.dumps(rows),
        tokens=np.concatenate(tokens),
        logprobs=np.concatenate(logprobs),
        experts=np.concatenate([x for x in experts if len(x)] or [NO_ROUTING.prompt]),
    )


def _completion_row(completion: Completion) -> dict[str, Any]:
    return _fields(
        completion,
        token_ids=len(completion.token_ids),
        logprobs=len(completion.logprobs),
        routing=len(completion.routing.response),
        versions=list(map(_fields, completion.versions)),
    )


def _fields(thing: Any, **changes: Any) -> dict[str, Any]:
    return {name: getattr(thing, name) for name in thing.__slots__} | changes


def unflatten(flat: FlatGroups) -> tuple[ScoredGroup, ...]:
    """The groups; their arrays are views."""
    cutters = tuple(map(_cutter, flat.arrays))
    return tuple(_group(row, *cutters) for row in json.loads(flat.text))


def _cutter(array: Any) -> Callable[[int], Any]:
    """Gives the next n elements of an array."""
    end = 0

    def cut(n: int) -> Any:
        nonlocal end
        end += n
        return array[end - n : end]

    return cut


def from_json(row: Mapping[str, Any]) -> ScoredGroup:
    """A group of a checkpoint that was written before there were arrays: it holds lists."""
    return _group(
        row,
        partial(np.array, dtype=np.int32),
        partial(np.array, dtype=np.float32),
        lambda _: NO_ROUTING.prompt,
    )


def _group(
    row: Mapping[str, Any],
    token_ids: Callable[[Any], Tokens],
    logprobs: Callable[[Any], LogProbs],
    experts: Callable[[Any], Experts],
) -> ScoredGroup:
    """Earlier versions knew no experts."""
    prompt = row["prompt"]
    changes = {"token_ids": token_ids(prompt["token_ids"]), "messages": tuple(prompt["messages"])}
    shared = experts(row.get("routing", 0))
    return ScoredGroup(
        prompt=Prompt(**prompt | changes),
        completions=tuple(
            Completion(
                **completion
                | {
                    "token_ids": token_ids(completion["token_ids"]),
                    "logprobs": logprobs(completion["logprobs"]),
                    "routing": Routing(
                        prompt=shared, response=experts(completion.get("routing", 0))
                    ),
                    "versions": tuple(VersionSpan(**span) for span in completion["versions"]),
                }
            )
            for completion in row["completions"]
        ),
        rewards=tuple(Reward(**reward) for reward in row["rewards"]),
    )
