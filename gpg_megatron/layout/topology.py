"""Which policy rank holds which rectangle of which Hugging Face tensor: a pure function.

    ModelShape + PolicyGrid --table of families.py--> {hf name: [Held, ...]}

Ranks that hold the same rectangle (data-parallel copies, tensor-parallel copies of norms) stand
together in one Held, so the result grows with the model and not with the number of ranks.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache

from gpg_megatron.config.sections import PolicyConfig
from gpg_megatron.layout.boxes import Box, Piece, Shard, replicated, split_dimension
from gpg_megatron.layout.families import dimensions, numberings, rules_of
from gpg_megatron.layout.rows import Rule
from gpg_megatron.model.pipeline import pipeline_stages
from gpg_megatron.shapes import ModelShape


@dataclass(frozen=True, kw_only=True)
class PolicyGrid:
    """How Megatron arranges the ranks: tensor-parallel neighbours first, then data-parallel
    copies (expert-parallel within them), then pipeline stages ("tp-cp-ep-dp-pp")."""

    tp_size: int
    dp_size: int
    stage_of_layer: tuple[int, ...]
    """The pipeline stage of each layer."""
    pp_size: int
    ep_size: int = 1
    """Divides dp_size."""
    transformer_engine: bool = False
    """Parameter names are those of Transformer Engine's fused modules."""

    @property
    def world_size(self) -> int:
        """Policy ranks."""
        return self.tp_size * self.dp_size * self.pp_size

    def rank(self, *, tp: int, dp: int, pp: int) -> int:
        """The global rank at a position."""
        return tp + self.tp_size * (dp + self.dp_size * pp)

    @cached_property
    def _shared(self) -> dict[tuple[int, int | None, int | None], tuple[int, ...]]:
        return {}

    def holders(self, stage: int, tp: int | None, ep: int | None) -> tuple[int, ...]:
        """Ranks of a stage at one tensor-parallel position (None: all) and, for experts, at
        one expert-parallel position. The same tuple object for the same arguments."""
        key = (stage, tp, ep)
        if key not in self._shared:
            copies = range(self.dp_size) if ep is None else range(ep, self.dp_size, self.ep_size)
            positions = range(self.tp_size) if tp is None else (tp,)
            self._shared[key] = tuple(
                self.rank(tp=t, dp=d, pp=stage) for d in copies for t in positions
            )
        return self._shared[key]


def policy_grid(
    policy: PolicyConfig, model: ModelShape, *, transformer_engine: bool = False
) -> PolicyGrid:
    """The arrangement of all policy ranks, and the names that their parameters have.

    Raises:
        UserError: the layers do not fit the pipeline stages.
    """
    return PolicyGrid(
        tp_size=policy.tensor_model_parallel_size,
        # Ranks that share a row hold the same weights, as data-parallel ranks do.
        dp_size=policy.context_parallel_size * policy.data_parallel_size,
        pp_size=policy.pipeline_model_parallel_size,
        stage_of_layer=pipeline_stages(policy, model.num_layers),
        ep_size=policy.expert_model_parallel_size,
        transformer_engine=transformer_engine,
    )


@dataclass(frozen=True, slots=True)
class Held:
    """A rectangle of a Hugging Face tensor and the ranks that hold it."""

    hf: Box
    parameter: str
    """Global Megatron name."""
    local: Box
    """Where it lies within the parameter shard."""
    ranks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Parameter:
    """One Megatron parameter of the whole model."""

    name: str
    hf_names: tuple[str, ...]
    rule: Rule
    shape: tuple[int, ...]
    """Of the whole parameter, before tensor parallelism."""
    stage: int
    numbers: tuple[int, ...]
    """Its layer, or its layer and expert, in the whole model."""

    @property
    def expert(self) -> int | None:
        """Global number of the expert it belongs to."""
        return self.numbers[1] if len(self.numbers) == 2 else None


def parameters(
    model: ModelShape,
    grid: PolicyGrid,
    *,
    padded_for_tp: int | None = None,
    of_stage: int | None = None,
) -> Iterator[Parameter]:
    """Every parameter of the policy, in the table's order.

    padded_for_tp: the tensor parallelism for which the vocabulary is padded; None: the grid's.
    of_stage: those of one pipeline stage only.
    """
    sizes = dimensions(model, padded_for_tp or grid.tp_size)
    last = grid.pp_size - 1
    for rule in rules_of(model):
        if rule.pattern.startswith("output_layer.") and model.tied and last == 0:
            continue  # a single stage has the embedding itself
        shape = tuple(sizes[d] for d in rule.dims)
        pattern = rule.megatron[-1] if grid.transformer_engine else rule.pattern
        for numbers in numberings(rule, model):
            stage = grid.stage_of_layer[numbers[0]] if numbers else last * rule.at_end
            if of_stage not in (None, stage):
                continue
            yield Parameter(
                name=pattern.format(*numbers),
                hf_names=tuple(hf.format(*numbers) for hf in rule.hf),
                rule=rule,
                shape=shape,
                stage=stage,
                numbers=numbers,
            )


def local_shapes(model: ModelShape, grid: PolicyGrid, rank: int) -> dict[str, tuple[int, ...]]:
    """Global name -> shard shape of every parameter that a rank must have."""
    stage = rank // (grid.tp_size * grid.dp_size)
    return {
        parameter.name: _shard_shape(parameter, grid.tp_size)
        for parameter in parameters(model, grid, of_stage=stage)
        if rank in grid.holders(parameter.stage, None, _expert_position(parameter, model, grid))
    }


def _expert_position(parameter: Parameter, model: ModelShape, grid: PolicyGrid) -> int | None:
    """The expert-parallel position that has it; None: all of them."""
    if parameter.expert is None:
        return None
    return parameter.expert // (model.num_experts // grid.ep_size)


_Rectangle = tuple[Box, Box, tuple[int, ...]]


@dataclass(frozen=True, slots=True, eq=False)
class Alike:
    """What the policy holds of each of some tensors that are alike, as those of experts and layers
    are: in all but the parameter's name. Equal when it is the same object."""

    rectangles: tuple[_Rectangle, ...]
    """Of each Held: hf, local, ranks."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a tensor of which these are all rectangles."""
        stops = (tuple(stop for _, stop in hf.ranges) for hf, _, _ in self.rectangles)
        return tuple(max(dimension) for dimension in zip(*stops, strict=True))

    def held(self, parameter: str) -> list[Held]:
        """Under the parameter's global name."""
        return [Held(hf, parameter, local, ranks) for hf, local, ranks in self.rectangles]


def alike_by_policy(model: ModelShape, grid: PolicyGrid) -> Iterator[tuple[str, str, Alike]]:
    """Hugging Face name, global Megatron name, and what is held of the one in the other. Tensors of
    one name in one row of the table share the boxes too, whoever holds them."""
    pieces: dict[str, list[tuple[int | None, Piece]]] = {}
    found: dict[tuple[str, int, int | None], dict[int, Alike]] = {}
    for parameter in parameters(model, grid):
        rule, ep = parameter.rule, _expert_position(parameter, model, grid)
        key = (rule.pattern, parameter.stage, ep)
        if key not in found:
            if rule.pattern not in pieces:
                pieces[rule.pattern] = _pieces(parameter, model, grid)
            rectangles: dict[int, list[_Rectangle]] = defaultdict(list)
            for tp, piece in pieces[rule.pattern]:
                ranks = grid.holders(parameter.stage, tp, ep)
                place = rule.hf.index(piece.hf_name)
                rectangles[place].append((piece.hf, piece.local, ranks))
            found[key] = {i: Alike(tuple(parts)) for i, parts in rectangles.items()}
        for i, alike in found[key].items():
            yield parameter.hf_names[i], parameter.name, alike


def _pieces(
    parameter: Parameter, model: ModelShape, grid: PolicyGrid
) -> list[tuple[int | None, Piece]]:
    """Tensor-parallel positions (None: all) and what they hold, with the rule's own names."""
    rule, shape = parameter.rule, _shard_shape(parameter, grid.tp_size)
    copies = rule.layout is replicated
    return [
        (None if copies else tp, piece)
        for tp in range(1 if copies else grid.tp_size)
        for piece in rule.layout(rule.hf, Shard(shape, tp, grid.tp_size), model)
    ]


def held_by_policy(model: ModelShape, grid: PolicyGrid) -> dict[str, list[Held]]:
    """Hugging Face name -> the disjoint rectangles that together are the tensor.

    A tied embedding that the first and the last stage both hold appears as two equal
    rectangles with different ranks.
    """
    held: dict[str, list[Held]] = defaultdict(list)
    for name, parameter, alike in alike_by_policy(model, grid):
        held[name] += alike.held(parameter)
    return dict(held)


def hf_shapes(model: ModelShape) -> dict[str, tuple[int, ...]]:
    """The shape of every Hugging Face tensor: what one rank alone would hold.

    Layer by layer, so that what belongs together in an engine also arrives together.
    """
    return dict(_hf_shapes(model))


@lru_cache(maxsize=4)
def _hf_shapes(model: ModelShape) -> Mapping[str, tuple[int, ...]]:
    alone = PolicyGrid(tp_size=1, dp_size=1, pp_size=1, stage_of_layer=(0,) * model.num_layers)
    shape_of = cache(lambda alike: alike.shape)
    shapes = {name: shape_of(alike) for name, _, alike in alike_by_policy(model, alone)}
    return dict(sorted(shapes.items(), key=lambda item: _place(item[0])))


def state_names(model: ModelShape) -> frozenset[str]:
    """The Hugging Face tensors that are not trained, and are fp32 whatever the parameters are."""
    return frozenset(
        hf.format(*numbers)
        for rule in rules_of(model)
        if rule.is_state
        for hf in rule.hf
        for numbers in numberings(rule, model)
    )


def _place(hf_name: str) -> float:
    """The layer of a tensor; before all of them for the embedding, after them for the rest."""
    if found := re.match(r"model\.layers\.(\d+)\.", hf_name):
        return int(found[1])
    return -1 if hf_name == "model.embed_tokens.weight" else math.inf


def check_shards(
    shards: Mapping[str, tuple[int, ...]], model: ModelShape, grid: PolicyGrid, rank: int
) -> None:
    """What a rank really has against what the table says.

    Raises:
        ValueError: a parameter is missing, unknown, or has another shape; it is named.
    """
    expected = local_shapes(model, grid, rank)
    for name in expected.keys() | shards.keys():
        if expected.get(name) != shards.get(name):
            raise ValueError(
                f"policy rank {rank}: parameter {name} has shape {shards.get(name)}, and the "
                f"table of {model.architecture} expects {expected.get(name)}"
            )


def _shard_shape(parameter: Parameter, tp_size: int) -> tuple[int, ...]:
    split = split_dimension(parameter.rule.layout)
    return tuple(
        n // tp_size if dimension == split else n for dimension, n in enumerate(parameter.shape)
    )
