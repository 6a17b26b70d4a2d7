"""What a rank holds of parameters and of Adam's state, as shards of a checkpoint's tensors.

With the distributed optimizer a rank keeps the state of a run of consecutive elements of some
parameters: its share of Megatron's flat buffers. Such a run is at most three rectangles of a
matrix, and each is a shard like any other. So every rank writes and reads what it holds, nothing is
gathered, and what one layout has written any other can read.

    parameter -> regions (Megatron stores gate and up projection apart) -> rectangles of the run
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from gpg_megatron.layout.boxes import flat_boxes

Regions = Mapping[torch.Tensor, Sequence[ShardedTensor]]
"""Parameter -> its stored regions, each consecutive rows of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """Consecutive elements of a parameter, and what this rank's optimizer keeps for them."""

    parameter: torch.Tensor
    start: int
    stop: int
    state: Mapping[str, torch.Tensor]
    """exp_avg, exp_avg_sq and, where the parameter is not fp32 itself, fp32_param."""
    is_share: bool
    """Other data-parallel ranks keep the other elements; else they keep the same ones."""


def parameter_regions(models: Sequence[GPTModel]) -> Regions:
    """Of every parameter of this rank's chunks; the shards alias it."""
    # The extra state of linear layers is about formats of 8 bits.
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    states = [model.sharded_state_dict(metadata={"dp_cp_group": group}) for model in models]
    return {
        whole.data: (
            list(nested_values(whole.build()))
            if isinstance(whole, ShardedTensorFactory)
            else [whole]
        )
        for state in states
        for name, whole in state.items()
        if not name.endswith("_extra_state")
    }


def optimizer_shards(optimizer: MegatronOptimizer, regions: Regions) -> list[ShardedTensor]:
    """Moments and fp32 master weights; the shards alias them."""
    return [
        shard
        for part in optimizer_parts(optimizer)
        for run in _runs(part, regions)
        for region in regions[run.parameter]
        for shard in _shards(run, region)
    ]


def begin_states(optimizer: MegatronOptimizer) -> None:
    """Make the moments, which Adam has only after the first step: loading comes before, and
    saving may."""
    for part in optimizer_parts(optimizer):
        part.init_state_fn(part.optimizer, part.config)
        if _counts_for_each_parameter(part):
            for state in part.optimizer.state.values():
                state.setdefault("step", torch.tensor(0.0))


def set_steps(optimizer: MegatronOptimizer, n_steps: int) -> None:
    """Tell Adam how many steps it has done."""
    for part in optimizer_parts(optimizer):
        if _counts_for_each_parameter(part):
            for state in part.optimizer.state.values():
                state["step"] = torch.tensor(float(n_steps))
        else:
            for group in part.optimizer.param_groups:
                group["step"] = n_steps


def optimizer_parts(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """Those that have parameters on this rank: Megatron may keep experts in one of their own."""
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return [part for part in parts if part.optimizer is not None]


def _counts_for_each_parameter(part: MegatronOptimizer) -> bool:
    """torch's Adam does; Apex and Transformer Engine count for a group of them."""
    return isinstance(part.optimizer, torch.optim.Adam)


def _runs(part: MegatronOptimizer, regions: Regions) -> Iterator[_Run]:
    is_share = isinstance(part, DistributedOptimizer)
    for parameter, main in _main_parameters(part, regions):
        start, stop = 0, parameter.numel()
        if is_share:
            of_parameter = part._get_model_param_range_map(parameter)["param"]
            start, stop = of_parameter.start, of_parameter.end
        kept = part.optimizer.state[main]
        state = {"exp_avg": kept["exp_avg"], "exp_avg_sq": kept["exp_avg_sq"]}
        if parameter.dtype != torch.float32:
            state["fp32_param"] = main
        yield _Run(parameter=parameter, start=start, stop=stop, state=state, is_share=is_share)


def _main_parameters(
    part: MegatronOptimizer, regions: Regions
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Each parameter that the part updates, and the tensor that Adam works on."""
    groups = part.optimizer.param_groups
    if isinstance(part, DistributedOptimizer):
        for parameter, (group, order) in part.model_param_group_index_map.items():
            yield parameter, groups[group]["params"][order]
        return
    owners = {getattr(parameter, "main_param", parameter): parameter for parameter in regions}
    for group in groups:
        yield from ((owners[main], main) for main in group["params"])


def _shards(run: _Run, region: ShardedTensor) -> Iterator[ShardedTensor]:
    """The part of the run that lies in the region."""
    assert region.data.is_contiguous(), region
    begin = region.data.storage_offset() - run.parameter.storage_offset()
    start = max(run.start - begin, 0)
    stop = min(run.stop - begin, region.data.numel())
    leading = region.prepend_axis_num
    pp, tp, dp = region.replica_id
    position = begin + start - run.start
    for box in flat_boxes(region.local_shape, start, stop):
        shape = (1,) * leading + box.shape
        corner = (0,) * leading + tuple(first for first, _ in box.ranges)
        for name, values in run.state.items():
            data = values.detach().view(-1)[position : position + box.numel].view(shape)
            yield ShardedTensor(
                key=f"optimizer.state.{name}.{region.key}",
                data=data,
                dtype=data.dtype,
                local_shape=shape,
                global_shape=region.global_shape,
                global_offset=tuple(
                    a + b for a, b in zip(region.global_offset, corner, strict=True)
                ),
                # None: no grid, every rank may have rectangles of other extents.
                axis_fragmentations=None,
                replica_id=(pp, tp, 0 if run.is_share else dp),
                allow_shape_mismatch=region.allow_shape_mismatch,
            )
        position += box.numel
