"""Which layers a pipeline stage holds, and how many passes it has under way."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpg_megatron.config.sections import PolicyConfig
from gpg_megatron.errors import UserError
from gpg_megatron.model.pipeline import passes_in_flight, pipeline_chunks, pipeline_stages


def policy_of(
    pp: int, virtual: int = 1, first: int | None = None, last: int | None = None
) -> PolicyConfig:
    return PolicyConfig(
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=virtual,
        num_layers_in_first_pipeline_stage=first,
        num_layers_in_last_pipeline_stage=last,
    )


@pytest.mark.parametrize(
    ("layers", "policy", "chunks"),
    [
        (8, policy_of(2), (4, 4)),
        (8, policy_of(2, 2), (2, 2, 2, 2)),
        (8, policy_of(2, 4), (1,) * 8),
        # One short: the stage with the loss. Two: that with the embedding, too.
        (31, policy_of(4), (8, 8, 8, 7)),
        (30, policy_of(4), (7, 8, 8, 7)),
        (29, policy_of(4), (7, 8, 7, 7)),
        (28, policy_of(4, 3), (2, 2, 2, 3, 2, 2, 2, 2, 3, 3, 3, 2)),
        # Qwen3-235B. Megatron's split that counts embedding and loss as a layer each is the same:
        # 96 / 8 = 12, and one fewer at the ends.
        (94, policy_of(4, 2), (11, 12, 12, 12, 12, 12, 12, 11)),
        (94, policy_of(8), (11, 12, 12, 12, 12, 12, 12, 11)),
        # DeepSeek-V3
        (61, policy_of(8), (7, 8, 8, 8, 8, 8, 7, 7)),
        (5, policy_of(3, first=1, last=1), (1, 3, 1)),
        (10, policy_of(2, 2, first=7), (3, 2, 4, 1)),
        (10, policy_of(3, last=1), (4, 5, 1)),
        (4, policy_of(1), (4,)),
    ],
)
def test_by_hand(layers: int, policy: PolicyConfig, chunks: tuple[int, ...]) -> None:
    assert pipeline_chunks(policy, layers) == chunks


def test_the_stage_of_each_layer() -> None:
    assert pipeline_stages(policy_of(2, 2), 8) == (0, 0, 1, 1, 0, 0, 1, 1)
    assert pipeline_stages(policy_of(3, first=1, last=2), 5) == (0, 1, 1, 2, 2)


ENDS = st.none() | st.integers(1, 6)


@given(st.integers(1, 40), st.integers(2, 6), st.integers(1, 3), ENDS, ENDS)
def test_every_layer_has_a_stage_and_stages_are_even(
    layers: int, pp: int, virtual: int, first: int | None, last: int | None
) -> None:
    given_sizes = {0: first, pp - 1: last}
    rest = layers - (first or 0) - (last or 0)
    free = [stage for stage in range(pp) if given_sizes.get(stage) is None]
    enough = rest >= virtual * len(free) if free else rest == 0
    policy = policy_of(pp, virtual, first, last)
    if not enough or min(first or virtual, last or virtual) < virtual:
        with pytest.raises(UserError, match=f"the model's {layers} layers: stages would have"):
            pipeline_chunks(policy, layers)
        return
    chunks = pipeline_chunks(policy, layers)
    assert len(chunks) == pp * virtual and sum(chunks) == layers
    sizes = [sum(chunks[stage::pp]) for stage in range(pp)]
    assert all(n in (None, sizes[stage]) for stage, n in given_sizes.items())
    assert (
        max(sizes[stage] for stage in free or [0]) - min(sizes[stage] for stage in free or [0]) <= 1
    )
    for stage in range(pp):
        assert max(chunks[stage::pp]) - min(chunks[stage::pp]) <= 1
    # Whatever is missing is missing where the loss is, and then where the embedding is.
    if last is None:
        assert sizes[-1] == min(sizes[stage] for stage in free)
    assert chunks[-1] == min(chunks[pp - 1 :: pp]) and chunks[0] == min(chunks[0::pp])


def test_the_refusals() -> None:
    with pytest.raises(UserError) as refused:
        pipeline_chunks(policy_of(5), 4)
    assert str(refused.value) == (
        "policy.pipeline_model_parallel_size=5 does not fit the model's 4 layers: stages would "
        "have [1, 1, 1, 1, 0]; expected at least 1 each, 4 together"
    )
    with pytest.raises(UserError, match=r"have \[3, 3\]; expected at least 1 each, 7 together"):
        pipeline_chunks(policy_of(2, first=3, last=3), 7)
    with pytest.raises(UserError, match=r"have \[2, 2\]; expected at least 3 each, 4 together"):
        pipeline_chunks(policy_of(2, 3), 4)


def test_passes_in_flight() -> None:
    """1F1B: as many micro-batches as there are stages from here to the last. Interleaved, two
    virtual stages: a group through all chunks but the last, and two for each stage behind."""
    assert [passes_in_flight(policy_of(4), stage, 100) for stage in range(4)] == [4, 3, 2, 1]
    assert [passes_in_flight(policy_of(4), stage, 2) for stage in range(4)] == [2, 2, 2, 1]
    assert [passes_in_flight(policy_of(4, 2), stage, 100) for stage in range(4)] == [11, 9, 7, 5]
    # Three micro-batches are filled up to four: eight passes in all.
    assert [passes_in_flight(policy_of(4, 2), stage, 3) for stage in range(4)] == [8, 8, 7, 5]
