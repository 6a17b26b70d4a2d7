"""Which layers a pipeline stage holds, and how many passes it has under way: pure functions.

A stage holds one run of layers (a chunk), or with virtual stages several. In the order of the
layers, chunk c lies on stage c mod pp:

    layers    0 1 | 2 3 | 4 5 | 6 7
    stage      0     1     0     1      pp = 2, two virtual stages
"""

from __future__ import annotations

from gpg_megatron.config.sections import PolicyConfig
from gpg_megatron.errors import UserError


def pipeline_chunks(policy: PolicyConfig, num_layers: int) -> tuple[int, ...]:
    """The layers of each chunk, in the order of the layers.

    Stages whose size is not given share the rest evenly. What does not divide is missing first on
    the last stage, which computes the loss, then on the first, which has the embedding, then
    further inwards. So do the chunks of a stage: those at an end of the model are the shorter ones.

    Raises:
        UserError: the layers do not fit.
    """
    pp, virtual = policy.pipeline_model_parallel_size, policy.virtual_pipeline_model_parallel_size
    last = pp - 1
    given = {
        0: policy.num_layers_in_first_pipeline_stage,
        last: policy.num_layers_in_last_pipeline_stage,
    }
    sizes = {stage: n for stage, n in given.items() if n is not None}
    rest = num_layers - sum(sizes.values())
    free = sorted(set(range(pp)) - set(sizes), key=lambda stage: (min(stage, last - stage), -stage))
    sizes |= {stage: (rest + place) // len(free) for place, stage in enumerate(free)}
    if sum(sizes.values()) != num_layers or min(sizes.values()) < virtual:
        raise UserError(
            f"policy.pipeline_model_parallel_size={pp} does not fit the model's {num_layers} "
            f"layers: stages would have {[sizes[stage] for stage in range(pp)]}; expected at least "
            f"{virtual} each, {num_layers} together"
        )
    return tuple(
        (sizes[stage] + (virtual - 1 - chunk if stage == last else chunk)) // virtual
        for chunk in range(virtual)
        for stage in range(pp)
    )


def pipeline_stages(policy: PolicyConfig, num_layers: int) -> tuple[int, ...]:
    """The stage of each layer. Raises UserError, see pipeline_chunks."""
    chunks = pipeline_chunks(policy, num_layers)
    pp = policy.pipeline_model_parallel_size
    return tuple(number % pp for number, n in enumerate(chunks) for _ in range(n))


def passes_in_flight(policy: PolicyConfig, stage: int, n_micro_batches: int) -> int:
    """Of a micro-batch through one chunk, those whose activations a stage keeps at once, at most:
    the warm-up of Megatron's schedule (1F1B, or interleaved) and one more."""
    pp, virtual = policy.pipeline_model_parallel_size, policy.virtual_pipeline_model_parallel_size
    behind = pp - 1 - stage
    if virtual == 1:
        return min(behind + 1, n_micro_batches)
    in_groups = -(-n_micro_batches // pp) * pp
    return min(2 * behind + (virtual - 1) * pp + 1, virtual * in_groups)
