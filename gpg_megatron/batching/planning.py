"""Which sample is computed by which rank, in which micro-batch, and beside which others.

    samples -> bundles that share a prompt -> ranks, balanced by cost -> micro-batches

Pure and deterministic: every rank plans the whole grid and takes its own row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import groupby

from gpg_megatron.model.flops import TokenCosts
from gpg_megatron.types import TrainSample

IMBALANCE = 1.05
"""A group is split over ranks, and its prompt computed on each, only while the most loaded rank
has more than this times the mean load."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """Samples that are packed one after the other and compute their common prompt once."""

    indices: tuple[int, ...]
    """Of the samples, ascending."""
    n_tokens: int
    """In the packed row."""
    cost: float
    """Floating-point operations."""


def shared_runs(samples: Sequence[TrainSample], *, share: bool) -> list[list[TrainSample]]:
    """Neighbours with the same prompt, as packing joins them; all alone without share.

    A prompt of one token has nothing to share: it is repeated for each response anyway.
    """
    if not share:
        return [[sample] for sample in samples]
    runs = [list(run) for _, run in groupby(samples, key=_prompt)]
    return [
        part
        for run in runs
        for part in ([run] if _can_share(run) else [[sample] for sample in run])
    ]


def _prompt(sample: TrainSample) -> bytes:
    """Equal for equal prompts."""
    return sample.prompt_token_ids.tobytes()


def _can_share(run: Sequence[TrainSample]) -> bool:
    return (
        len(run) > 1
        and len(run[0].prompt_token_ids) > 1
        and all(len(sample.response_token_ids) for sample in run)
    )


def run_tokens(run: Sequence[TrainSample]) -> int:
    """Tokens that a run of shared_runs takes in the packed row."""
    n_prompt, n_response = len(run[0].prompt_token_ids), _n_response(run)
    return n_prompt + n_response - (len(run) > 1)


def run_cost(run: Sequence[TrainSample], costs: TokenCosts) -> float:
    """Floating-point operations of a run of shared_runs."""
    n_shared = run_tokens(run) - _n_response(run) if len(run) > 1 else 0
    pairs = costs.pairs(0, n_shared)
    for sample in run:
        own = len(sample.response_token_ids)
        own += 0 if len(run) > 1 else len(sample.prompt_token_ids)
        pairs += costs.pairs(n_shared, own)
    return costs.total(n_tokens=run_tokens(run), n_loss_tokens=_n_response(run), n_pairs=pairs)


def _n_response(run: Sequence[TrainSample]) -> int:
    return sum(len(sample.response_token_ids) for sample in run)


def plan_grid(
    samples: Sequence[TrainSample],
    *,
    dp_size: int,
    max_tokens: int,
    costs: TokenCosts,
    share: bool,
) -> list[list[list[int]]]:
    """Which sample goes to which rank and micro-batch.

    Samples with one prompt stay together as far as the token budget and the balance of the
    ranks allow. The bundles go, most costly first, to the least loaded rank, and there to the
    least loaded micro-batch with room. One micro-batch fewer would exceed max_tokens on some
    rank; a sample longer than that goes alone.

    Args:
        samples: each with at least one token of prompt.
        dp_size: ranks.
        max_tokens: budget of a micro-batch, in packed tokens.
        costs: what is balanced.
        share: samples with the same prompt compute it once.

    Returns:
        grid[rank][micro_batch] = sample indices, bundle after bundle. Rows are equally long,
        most costly micro-batch first; empty cells come last and only where a rank has too few
        bundles.
    """
    bundles = _bundles(samples, max_tokens, costs, share)
    ranks = _to_ranks(samples, bundles, dp_size, costs)
    n_tokens = [[min(bundle.n_tokens, max_tokens) for bundle in rank] for rank in ranks]
    low = max(-(-sum(row) // max_tokens) for row in n_tokens)
    high = max(map(len, ranks))  # with a micro-batch for each bundle everything fits
    while low < high:
        middle = (low + high) // 2
        if all(_fill(rank, middle, max_tokens) for rank in ranks if rank):
            high = middle
        else:
            low = middle + 1
    return [_row(_fill(rank, high, max_tokens)) for rank in ranks]


def _bundles(
    samples: Sequence[TrainSample], max_tokens: int, costs: TokenCosts, share: bool
) -> list[Bundle]:
    """The samples of each prompt in as few bundles as the token budget allows."""
    families: dict[object, list[int]] = {}
    for i, sample in enumerate(samples):
        families.setdefault(_prompt(sample) if share else i, []).append(i)
    return [
        _bundle(samples, indices, costs)
        for family in families.values()
        for indices in _parts(samples, family, max_tokens)
    ]


def _parts(
    samples: Sequence[TrainSample], family: Sequence[int], max_tokens: int
) -> list[list[int]]:
    """Samples with one prompt in parts within the budget, evenly; a longer sample goes alone."""
    if not _can_share([samples[i] for i in family]):
        return [[i] for i in family]
    lengths = {i: len(samples[i].response_token_ids) for i in family}
    responses = [Bundle(indices=(i,), n_tokens=n, cost=n) for i, n in lengths.items()]
    budget = max_tokens - len(samples[family[0]].prompt_token_ids)
    count = -(-sum(lengths.values()) // budget) if budget > 0 else len(family)
    while not (parts := _fill(_heaviest_first(responses), count, budget)):
        count += 1
    return [[i for response in part for i in response.indices] for part in parts if part]


def _bundle(samples: Sequence[TrainSample], indices: Sequence[int], costs: TokenCosts) -> Bundle:
    run = [samples[i] for i in indices]
    return Bundle(
        indices=tuple(sorted(indices)), n_tokens=run_tokens(run), cost=run_cost(run, costs)
    )


def _to_ranks(
    samples: Sequence[TrainSample], bundles: list[Bundle], dp_size: int, costs: TokenCosts
) -> list[list[Bundle]]:
    """The bundles of each rank; the largest are split while that evens out the ranks."""
    target = IMBALANCE * sum(bundle.cost for bundle in bundles) / dp_size
    best = ranks = _fill(_heaviest_first(bundles), dp_size)
    for _ in range(4 * dp_size if dp_size > 1 else 0):
        large = max((b for b in bundles if len(b.indices) > 1), key=_weight, default=None)
        if _makespan(best) <= target or large is None:
            break
        by_length = sorted(large.indices, key=lambda i: -len(samples[i].response_token_ids))
        bundles = [b for b in bundles if b is not large]
        bundles += [_bundle(samples, by_length[k::2], costs) for k in range(2)]
        ranks = _fill(_heaviest_first(bundles), dp_size)
        # Every split repeats a prompt: it has to pay.
        best = ranks if _makespan(ranks) < 0.99 * _makespan(best) else best
    return best


def _makespan(ranks: Sequence[Sequence[Bundle]]) -> float:
    return max(sum(bundle.cost for bundle in rank) for rank in ranks)


def _weight(bundle: Bundle) -> tuple[float, tuple[int, ...]]:
    return bundle.cost, bundle.indices


def _heaviest_first(bundles: Sequence[Bundle]) -> list[Bundle]:
    return sorted(bundles, key=lambda bundle: (-bundle.cost, bundle.indices))


def _fill(
    heaviest_first: Sequence[Bundle], n_bins: int, budget: int | None = None
) -> list[list[Bundle]]:
    """Put each bundle into the least costly bin with room; no bins at all when there is none.

    A bundle above the budget fits into an empty bin, and fills it. None: no budget.
    """
    bins: list[list[Bundle]] = [[] for _ in range(n_bins)]
    sizes = [0] * n_bins
    least_costly = [(0.0, k) for k in range(n_bins)]
    for bundle in heaviest_first:
        full = []
        while least_costly:
            cost, k = heappop(least_costly)
            if budget is None or not sizes[k] or sizes[k] + bundle.n_tokens <= budget:
                break
            full.append((cost, k))
        else:
            return []
        bins[k].append(bundle)
        sizes[k] += bundle.n_tokens
        for entry in (*full, (cost + bundle.cost, k)):
            heappush(least_costly, entry)
    return bins


def _row(cells: Sequence[Sequence[Bundle]]) -> list[list[int]]:
    """Sample indices of each micro-batch; bundles by their first sample."""
    ordered = sorted(cells, key=lambda cell: (-sum(b.cost for b in cell), _first_indices(cell)))
    return [
        [i for bundle in sorted(cell, key=lambda b: b.indices) for i in bundle.indices]
        for cell in ordered
    ]


def _first_indices(cell: Sequence[Bundle]) -> list[int]:
    return sorted(bundle.indices[0] for bundle in cell)
