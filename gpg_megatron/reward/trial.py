"""A custom reward function is called once before a run: its mistakes are found early."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace

from gpg_megatron.config.reward import RewardConfig
from gpg_megatron.errors import UserError
from gpg_megatron.reward.pool import FAILURES, RewardPool
from gpg_megatron.reward.sources import scorer_name
from gpg_megatron.types import Prompt


def try_custom_function(prompts: Sequence[Prompt], config: RewardConfig) -> None:
    """Let it judge the ground truth of the first row that is its own, in a scoring process, under
    the limits of the run. Without a custom function nothing happens.

    Raises:
        UserError: what it raised, or which limit it broke.
    """
    if config.custom_function is None:
        return
    mine = (p for p in prompts if scorer_name(p.data_source, config) == "custom")
    if (prompt := next(mine, None)) is None:
        return
    with closing(RewardPool(replace(config, num_workers=1, weights={"answer": 1.0}))) as pool:
        try:
            reward, error = pool.attempt(prompt, prompt.ground_truth)
        except (TypeError, AttributeError) as failed:  # pickle's
            raise UserError(f"{prompt.id}: extra_info cannot be sent: {failed}") from None
    limits = {
        "timeout": f"took more than reward.timeout_s={config.timeout_s:g} s",
        "memory": f"needed more than reward.memory_limit_mb={config.memory_limit_mb}",
        "crash": error.removeprefix("custom: "),
    }
    for failure in FAILURES & reward.parts.keys():
        raise UserError(
            f"reward.custom_function {config.custom_function} on {prompt.id}: {limits[failure]}"
        )
