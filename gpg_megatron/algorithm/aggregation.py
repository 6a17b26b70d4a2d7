"""How the token losses of one optimizer step become one number.

    loss = - sum_i sum_t  logprob_it * A_i * w_i        over the whole global batch

w_i is the weight of every response token of sample i. All denominators live in it and are
counted once, before samples are dropped, packed or spread over ranks: a plain sum over
micro-batches and data-parallel ranks is then the loss, whatever the layout.

Legend: N samples, L_i response tokens of sample i, T = sum of L_i, Q questions (groups),
T_q response tokens of question q, C cells (micro-batches of all ranks) that count and have a
response token, T_c response tokens of the cell of sample i.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from gpg_megatron.types import TrainSample


def aggregation_weights(
    samples: Sequence[TrainSample],
    mode: str,
    max_response_length: int,
    cells: Sequence[Sequence[int]] = (),
) -> list[float]:
    """The weight w_i of every response token, per sample.

    | mode | w_i |
    |---|---|
    | token-mean | 1 / T |
    | seq-mean-token-sum | 1 / N |
    | seq-mean-token-mean | 1 / (L_i N) |
    | seq-mean-token-sum-norm | 1 / (N max_response_length) |
    | group-token-mean (arXiv 2504.02546) | 1 / (Q T_q) |
    | micro-batch-token-mean (AMAP-ML/GPG) | 1 / (C T_c) |

    Args:
        samples: all samples of one optimizer step, all ranks, zero advantages included.
        mode: a key of the table.
        max_response_length: tokens; read by seq-mean-token-sum-norm only.
        cells: indices of the samples of each cell that counts, no sample in two; read by
            micro-batch-token-mean only.

    Returns:
        one weight per sample; 0.0 for an empty response, which has no token to weigh, and for a
        sample of a cell that does not count.
    """
    if mode == "micro-batch-token-mean":
        weights = _micro_batch_token_mean(samples, cells)
    else:
        weights = _WEIGHTS[mode](samples, max_response_length)
    return [w if len(s.response_token_ids) else 0.0 for s, w in zip(samples, weights, strict=True)]


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


def _micro_batch_token_mean(
    samples: Sequence[TrainSample], cells: Sequence[Sequence[int]]
) -> list[float]:
    members = [i for cell in cells for i in cell]
    assert len(set(members)) == len(members) <= len(samples), "a sample is in one cell"
    tokens_of_cell = [sum(_length(samples[i]) for i in cell) for cell in cells]
    n_cells = sum(tokens > 0 for tokens in tokens_of_cell)
    weights = [0.0] * len(samples)
    for cell, tokens in zip(cells, tokens_of_cell, strict=True):
        for i in cell:
            weights[i] = _inverse(n_cells * tokens)
    return weights


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
