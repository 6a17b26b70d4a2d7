"""How the token losses of one optimizer step become one number.

    loss = - sum_i sum_t  logprob_it * A_i * w_i        over the whole global batch

w_i is the weight of every response token of sample i. All denominators live in it and are
counted once, before samples are dropped, packed or spread over ranks: a plain sum over
micro-batches and data-parallel ranks is then the loss, whatever the layout.

Legend: N samples, L_i response tokens of sample i, T = sum of L_i, Q questions (groups),
T_q response tokens of question q.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from gpg_megatron.types import TrainSample


def aggregation_weights(
    samples: Sequence[TrainSample], mode: str, max_response_length: int
) -> list[float]:
    """The weight w_i of every response token, per sample.

    | mode | w_i |
    |---|---|
    | token-mean | 1 / T |
    | seq-mean-token-sum | 1 / N |
    | seq-mean-token-mean | 1 / (L_i N) |
    | seq-mean-token-sum-norm | 1 / (N max_response_length) |
    | group-token-mean (arXiv 2504.02546) | 1 / (Q T_q) |

    Args:
        samples: all samples of one optimizer step, all ranks, zero advantages included.
        mode: a key of the table.
        max_response_length: tokens; read by seq-mean-token-sum-norm only.

    Returns:
        one weight per sample; 0.0 for an empty response, which has no token to weigh.
    """
    weights = _WEIGHTS[mode](samples, max_response_length)
    return [w if s.response_token_ids else 0.0 for s, w in zip(samples, weights, strict=True)]


def _token_mean(samples: Sequence[TrainSample], _: int) -> list[float]:
    return [_inverse(sum(map(_length, samples)))] * len(samples)


def _seq_mean_token_sum(samples: Sequence[TrainSample], _: int) -> list[float]:
    return [_inverse(len(samples))] * len(samples)


def _seq_mean_token_mean(samples: Sequence[TrainSample], _: int) -> list[float]:
    return [_inverse(_length(sample) * len(samples)) for sample in samples]


def _seq_mean_token_sum_norm(samples: Sequence[TrainSample], max_length: int) -> list[float]:
    return [_inverse(len(samples) * max_length)] * len(samples)


def _group_token_mean(samples: Sequence[TrainSample], _: int) -> list[float]:
    tokens_of_group: Counter[int] = Counter()
    for sample in samples:
        tokens_of_group[sample.group] += _length(sample)
    n_groups = len(tokens_of_group)
    return [_inverse(n_groups * tokens_of_group[sample.group]) for sample in samples]


_WEIGHTS: dict[str, Callable[[Sequence[TrainSample], int], list[float]]] = {
    "token-mean": _token_mean,
    "seq-mean-token-sum": _seq_mean_token_sum,
    "seq-mean-token-mean": _seq_mean_token_mean,
    "seq-mean-token-sum-norm": _seq_mean_token_sum_norm,
    "group-token-mean": _group_token_mean,
}


def _length(sample: TrainSample) -> int:
    return len(sample.response_token_ids)


def _inverse(count: int) -> float:
    """1 / count; 0.0 for 0, a denominator that no token uses."""
    return 1.0 / count if count else 0.0
