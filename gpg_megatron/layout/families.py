"""The table: one row for each kind of parameter, read in both directions.

`{}` stands for the layer number, a second one for the expert's. Names of the local layer spec
and of Transformer Engine's fused modules are both listed; they mean the same tensor.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Literal

from gpg_megatron.errors import UserError
from gpg_megatron.layout.boxes import (
    Layout,
    Piece,
    Shard,
    columns,
    convolution_rows,
    delta_rows,
    gated_rows,
    qkv_rows,
    replicated,
    rows,
    vocab_rows,
)
from gpg_megatron.model.shape import padded_vocab_size
from gpg_megatron.shapes import ModelShape

Layers = Literal["all", "dense", "sparse", "attention", "delta"]
"""dense: with an MLP; sparse: with experts; delta: with a gated delta net in attention's place."""


@dataclass(frozen=True, slots=True)
class Rule:
    """A Megatron parameter, the Hugging Face tensors it is made of, and how."""

    megatron: tuple[str, ...]
    """Patterns of the same parameter: local spec first, then Transformer Engine."""
    hf: tuple[str, ...]
    layout: Layout
    dims: tuple[str, ...]
    """Of the whole Megatron parameter: keys of dimensions()."""
    layers: Layers = "all"
    """That have one, if it is in layers."""

    @property
    def pattern(self) -> str:
        """The local spec's name."""
        return self.megatron[0]

    @property
    def per_layer(self) -> bool:
        """Whether layers have one."""
        return "{}" in self.pattern

    @property
    def per_expert(self) -> bool:
        """Whether every expert of a layer has one; expert parallelism spreads them."""
        return self.pattern.count("{}") == 2

    @property
    def at_end(self) -> bool:
        """Whether it is on the last pipeline stage, for a parameter outside the layers."""
        return not self.pattern.startswith("embedding.")


def _row(
    megatron: str,
    hf: str,
    layout: Layout,
    dims: str,
    prefixes: tuple[str, str],
    layers: Layers = "all",
) -> Rule:
    megatron_prefix, hf_prefix = prefixes
    return Rule(
        tuple(megatron_prefix + name for name in megatron.split()),
        tuple(hf_prefix + name for name in hf.split()),
        layout,
        tuple(dims.split()),
        layers,
    )


_once = partial(_row, prefixes=("", ""))
_layer = partial(_row, prefixes=("decoder.layers.{}.", "model.layers.{}."))
_dense = partial(_layer, layers="dense")
_sparse = partial(_layer, layers="sparse")
_attention = partial(
    _row,
    prefixes=("decoder.layers.{}.self_attention.", "model.layers.{}.self_attn."),
    layers="attention",
)
_delta = partial(
    _row,
    prefixes=("decoder.layers.{}.self_attention.", "model.layers.{}.linear_attn."),
    layers="delta",
)
_shared = partial(
    _row,
    prefixes=("decoder.layers.{}.mlp.shared_experts.", "model.layers.{}.mlp.shared_expert"),
    layers="sparse",
)

_COMMON = (
    _once(
        "embedding.word_embeddings.weight", "model.embed_tokens.weight", vocab_rows, "vocab hidden"
    ),
    _once("decoder.final_layernorm.weight", "model.norm.weight", replicated, "hidden"),
    _layer(
        "input_layernorm.weight self_attention.linear_qkv.layer_norm_weight",
        "input_layernorm.weight", replicated, "hidden", layers="attention",
    ),
    _attention(
        "linear_qkv.weight", "q_proj.weight k_proj.weight v_proj.weight", qkv_rows, "qkv hidden"
    ),
    _attention("linear_proj.weight", "o_proj.weight", columns, "hidden q"),
)  # fmt: skip
_QKV_BIAS = (_attention("linear_qkv.bias", "q_proj.bias k_proj.bias v_proj.bias", qkv_rows, "qkv"),)
_OUTPUT_BIAS = (_attention("linear_proj.bias", "o_proj.bias", replicated, "hidden"),)
_QK_NORM = (
    _attention("q_layernorm.weight", "q_norm.weight", replicated, "head"),
    _attention("k_layernorm.weight", "k_norm.weight", replicated, "head"),
)
_POST_NORMS = (
    _layer(
        "post_self_attn_layernorm.weight",
        "post_self_attn_layernorm.weight", replicated, "hidden",
    ),
    _layer("post_mlp_layernorm.weight", "post_mlp_layernorm.weight", replicated, "hidden"),
)  # fmt: skip
_DELTA_PROJECTIONS = (
    _delta(
        "in_proj.weight",
        "in_proj_qkv.weight in_proj_z.weight in_proj_b.weight in_proj_a.weight",
        delta_rows, "delta_in hidden",
    ),
)  # fmt: skip
_DELTA_FUSED = (
    _delta(
        "in_proj.weight", "in_proj_qkvz.weight in_proj_ba.weight", delta_rows, "delta_in hidden"
    ),
)  # fmt: skip
_DELTA = (
    _layer(
        "input_layernorm.weight", "input_layernorm.weight", replicated, "hidden", layers="delta"
    ),
    _delta("conv_weight", "conv1d.weight", convolution_rows, "delta_qkv one delta_kernel"),
    _delta("dt_bias", "dt_bias", rows, "delta_heads"),
    _delta("A_log", "A_log", rows, "delta_heads"),
    _delta("norm_weight", "norm.weight", replicated, "delta_head"),
    _delta("out_proj.weight", "out_proj.weight", columns, "hidden delta_values"),
)
_DENSE_NORM = (
    _dense(
        "pre_mlp_layernorm.weight mlp.linear_fc1.layer_norm_weight",
        "post_attention_layernorm.weight", replicated, "hidden",
    ),
)  # fmt: skip
_GATE_AND_UP = (
    _dense(
        "mlp.linear_fc1.weight",
        "mlp.gate_proj.weight mlp.up_proj.weight", gated_rows, "gate_and_up hidden",
    ),
)  # fmt: skip
_GATE_UP = (
    _dense(
        "mlp.linear_fc1.weight", "mlp.gate_up_proj.weight", gated_rows, "gate_and_up hidden"
    ),
)  # fmt: skip
_DOWN = (_dense("mlp.linear_fc2.weight", "mlp.down_proj.weight", columns, "hidden ffn"),)
_MLP_BIAS = (
    _dense("mlp.linear_fc1.bias", "mlp.gate_proj.bias mlp.up_proj.bias", gated_rows, "gate_and_up"),
    _dense("mlp.linear_fc2.bias", "mlp.down_proj.bias", replicated, "hidden"),
)
_MOE_MLP = (
    _sparse(
        "pre_mlp_layernorm.weight", "post_attention_layernorm.weight", replicated, "hidden"
    ),
    _sparse("mlp.router.weight", "mlp.gate.weight", replicated, "experts hidden"),
    _sparse(
        "mlp.experts.local_experts.{}.linear_fc1.weight mlp.experts.linear_fc1.weight{}",
        "mlp.experts.{}.gate_proj.weight mlp.experts.{}.up_proj.weight",
        gated_rows, "expert_gate_and_up hidden",
    ),
    _sparse(
        "mlp.experts.local_experts.{}.linear_fc2.weight mlp.experts.linear_fc2.weight{}",
        "mlp.experts.{}.down_proj.weight", columns, "hidden expert_ffn",
    ),
)  # fmt: skip
_SHARED_EXPERT = (
    _shared("gate_weight", "_gate.weight", replicated, "one hidden"),
    _shared(
        "linear_fc1.weight",
        ".gate_proj.weight .up_proj.weight", gated_rows, "shared_gate_and_up hidden",
    ),
    _shared("linear_fc2.weight", ".down_proj.weight", columns, "hidden shared_ffn"),
)  # fmt: skip
# Under pipeline parallelism the last stage of a tied model holds a copy of the embedding.
_TIED_HEAD = (
    _once("output_layer.weight", "model.embed_tokens.weight", vocab_rows, "vocab hidden"),
)
_HEAD = (_once("output_layer.weight", "lm_head.weight", vocab_rows, "vocab hidden"),)


def rules_of(model: ModelShape) -> tuple[Rule, ...]:
    """The rows of the table that a model uses."""
    dense = _DENSE_NORM + (_GATE_UP if model.fused_gate_up else _GATE_AND_UP) + _DOWN
    delta: tuple[Rule, ...] = ()
    if model.delta:
        delta = _DELTA + (_DELTA_FUSED if model.delta.fused else _DELTA_PROJECTIONS)
    return (
        _COMMON
        + delta
        + (dense if model.dense_layers else ())
        + (_MOE_MLP if model.moe else ())
        + (_SHARED_EXPERT if model.moe and model.moe.shared_ffn_size else ())
        + (_QKV_BIAS if model.qkv_bias else ())
        + (_OUTPUT_BIAS if model.output_bias else ())
        + (_MLP_BIAS if model.mlp_bias else ())
        + (_QK_NORM if model.qk_norm else ())
        + (_POST_NORMS if model.post_norms else ())
        + (_TIED_HEAD if model.tied else _HEAD)
    )


def dimensions(model: ModelShape, tp_size: int) -> dict[str, int]:
    """What the names in Rule.dims stand for, in elements."""
    sizes = {
        "one": 1,
        "hidden": model.hidden_size,
        "head": model.head_dim,
        "q": model.num_heads * model.head_dim,
        "qkv": (model.num_heads * (1 + model.output_gate) + 2 * model.num_kv_heads)
        * model.head_dim,
        "ffn": model.ffn_size,
        "gate_and_up": 2 * model.ffn_size,
        "vocab": padded_vocab_size(model, tp_size),
    }
    if model.moe:
        sizes |= {
            "experts": model.moe.num_experts,
            "expert_ffn": model.moe.ffn_size,
            "expert_gate_and_up": 2 * model.moe.ffn_size,
            "shared_ffn": model.moe.shared_ffn_size,
            "shared_gate_and_up": 2 * model.moe.shared_ffn_size,
        }
    if delta := model.delta:
        sizes |= {
            "delta_in": 2 * (delta.key_width + delta.value_width + delta.value_heads),
            "delta_qkv": 2 * delta.key_width + delta.value_width,
            "delta_kernel": delta.kernel,
            "delta_heads": delta.value_heads,
            "delta_head": delta.value_dim,
            "delta_values": delta.value_width,
        }
    return sizes


_NUMBERS = re.compile(r"(?<=decoder\.layers\.)\d+|(?<=local_experts\.)\d+|(?<=\.weight)\d+$")


def pieces_of(name: str, shard: Shard, model: ModelShape) -> list[Piece]:
    """What one Megatron parameter shard holds, in Hugging Face coordinates.

    Args:
        name: global parameter name, with the layer (and expert) number of the whole model.

    Raises:
        UserError: no row of the table names this parameter.
    """
    # ("decoder.layers.{}.x", ["7"]) for "decoder.layers.7.x"
    pattern, numbers = _NUMBERS.sub("{}", name), _NUMBERS.findall(name)
    for rule in rules_of(model):
        if pattern in rule.megatron:
            return rule.layout([hf.format(*numbers) for hf in rule.hf], shard, model)
    raise UserError(
        f"{model.architecture}: no layout rule for Megatron parameter {name!r}; "
        f"gpg_megatron/layout/families.py needs a row for it"
    )


def numberings(rule: Rule, model: ModelShape) -> Iterator[tuple[int, ...]]:
    """The layer and expert numbers under which a row of the table exists."""
    every = range(model.num_layers)
    kinds = {
        "all": every,
        "dense": model.dense_layers,
        "sparse": [i for i in every if i not in model.dense_layers],
        "attention": [i for i in every if i not in model.delta_layers],
        "delta": model.delta_layers,
    }
    layers = [kinds[rule.layers]] if rule.per_layer else []
    experts = [range(model.num_experts)] if rule.per_expert else []
    return product(*layers, *experts)
