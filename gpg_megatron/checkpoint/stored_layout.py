"""Where each parameter lies in a torch_dist checkpoint: the table of families.py once more.

Megatron stores the parameters of all layers (and experts) under one key, as one tensor with
leading dimensions for layer and expert, in the order that a single tensor-parallel rank has. Where
layers differ, each has keys of its own. Names are those of
Transformer Engine's modules, whatever the layer spec.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from gpg_megatron.layout.boxes import Box, Piece, Shard, gated_rows, split_dimension
from gpg_megatron.layout.families import Rule
from gpg_megatron.layout.topology import Parameter, PolicyGrid, parameters
from gpg_megatron.shapes import ModelShape


@dataclass(frozen=True, slots=True)
class StoredParameter:
    """One parameter of the whole model and its place in the stored tensor."""

    key: str
    leading: tuple[int, ...]
    """Extents of the stored tensor's dimensions for layer and expert."""
    parameter: Parameter

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole stored tensor."""
        return self.leading + self.parameter.shape

    def box(self, local: Box) -> Box:
        """A box of the parameter, in the stored tensor's coordinates."""
        numbers = self.parameter.numbers
        leading = numbers[len(numbers) - len(self.leading) :]
        return Box(tuple((n, n + 1) for n in leading) + local.ranges)

    def pieces(self, model: ModelShape) -> list[Piece]:
        """What it holds, in Hugging Face coordinates; each piece is whole rows of both."""
        rule = self.parameter.rule
        pieces = rule.layout(self.parameter.hf_names, Shard(self.parameter.shape, 0, 1), model)
        ranges = [r for x in pieces for r in (*x.hf.ranges[1:], *x.local.ranges[1:])]
        assert all(start == 0 for start, _ in ranges), pieces
        return pieces


def stored_parameters(model: ModelShape, tp_size: int) -> Iterator[StoredParameter]:
    """Every parameter as ranks with this tensor parallelism store it.

    tp_size only decides how far the vocabulary is padded. A tied model stores its embedding once.
    """
    grid = PolicyGrid(
        tp_size=1,
        dp_size=1,
        pp_size=1,
        stage_of_layer=(0,) * model.num_layers,
        transformer_engine=True,
    )
    alike = model.layers_alike
    for parameter in parameters(model, grid, padded_for_tp=tp_size):
        rule = parameter.rule
        layers = (model.num_layers,) * (rule.per_layer and alike)
        leading = layers + (model.num_experts,) * rule.per_expert
        layer = f"{parameter.numbers[0]}." if rule.per_layer and not alike else ""
        yield StoredParameter(_key(rule, layer), leading, parameter)


def _key(rule: Rule, layer: str) -> str:
    """The name without its numbers but the layer's; experts are one level deeper in a stored
    name."""
    key = rule.megatron[-1].replace("layers.{}.", f"layers.{layer}").replace("weight{}", "weight")
    return key.replace(".mlp.experts.", ".mlp.experts.experts.")


def shard_boxes(parameter: Parameter, tp_rank: int, tp_size: int) -> list[Box]:
    """The boxes of the whole parameter that one tensor-parallel rank stores."""
    split = split_dimension(parameter.rule.layout)
    whole = Box.whole(parameter.shape)
    if split is None:
        return [whole] if tp_rank == 0 else []
    # The gate's rows and the up projection's are cut each for itself.
    parts = 2 if parameter.rule.layout is gated_rows else 1
    extent = parameter.shape[split] // parts
    size = extent // tp_size
    before, after = whole.ranges[:split], whole.ranges[split + 1 :]
    return [
        Box((*before, (start, start + size), *after))
        for start in range(tp_rank * size, parameter.shape[split], extent)
    ]
