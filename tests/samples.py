"""Training samples for tests of what is made of them."""

from __future__ import annotations

from collections.abc import Iterable

from gpg_megatron.types import TrainSample


def train_sample(
    prompt: Iterable[int] = (1, 2),
    response: Iterable[int] = (3, 4),
    *,
    group: int = 0,
    index: int = 0,
    advantage: float = 1.0,
) -> TrainSample:
    """Log-probs are a function of the token, so that the packed ones can be checked by token."""
    response = tuple(response)
    return TrainSample(
        prompt_id=f"toy/{group}",
        group=group,
        index=index,
        prompt_token_ids=tuple(prompt),
        response_token_ids=response,
        rollout_logprobs=tuple(-0.125 * token for token in response),
        advantage=advantage,
        version=0,
        live=True,
        score=1.0,
    )
