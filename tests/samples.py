"""Arrays and training samples for tests, and objects that hold arrays in a form that compares."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np

from gpg_megatron.types import NO_ROUTING, LogProbs, Routing, Tokens, TrainSample


def int32(values: Iterable[int]) -> Tokens:
    """Token ids."""
    return np.array(list(values), np.int32)


def float32(values: Iterable[float]) -> LogProbs:
    """Log-probs."""
    return np.array(list(values), np.float32)


def routing(
    prompt: Iterable[int] = (), response: Iterable[int] = (), *, layers: int = 2, per_token: int = 2
) -> Routing:
    """One number for each token; the experts are that number, and those that follow by layer and
    then by place."""
    places = np.arange(layers * per_token, dtype=np.uint8).reshape(layers, per_token)
    rows = [
        np.array([number + places for number in numbers], np.uint8).reshape(-1, layers, per_token)
        for numbers in (prompt, response)
    ]
    return Routing(prompt=rows[0], response=rows[1])


def plain(thing: Any) -> Any:
    """A dataclass with all that it holds as dictionaries, lists and (type, values) of arrays."""
    if dataclasses.is_dataclass(thing):
        return {f.name: plain(getattr(thing, f.name)) for f in dataclasses.fields(thing)}
    if isinstance(thing, np.ndarray):
        return thing.dtype.name, thing.tolist()
    return [plain(part) for part in thing] if isinstance(thing, (list, tuple)) else thing


def train_sample(
    prompt: Iterable[int] = (1, 2),
    response: Iterable[int] = (3, 4),
    *,
    group: int = 0,
    index: int = 0,
    advantage: float = 1.0,
    routing: Routing = NO_ROUTING,
) -> TrainSample:
    """Log-probs are a function of the token, so that the packed ones can be checked by token."""
    response = tuple(response)
    return TrainSample(
        prompt_id=f"toy/{group}",
        group=group,
        index=index,
        prompt_token_ids=int32(prompt),
        response_token_ids=int32(response),
        rollout_logprobs=float32(-0.125 * token for token in response),
        advantage=advantage,
        version=0,
        live=True,
        score=1.0,
        routing=routing,
    )
