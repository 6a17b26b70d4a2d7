"""The table: one row for each kind of parameter, read in both directions.

`{}` stands for the layer number. Names of the local layer spec and of Transformer Engine's
fused modules are both listed; they mean the same tensor.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from gpg_megatron.bridge.layout import (
    Layout,
    Piece,
    Shard,
    columns,
    gated_rows,
    qkv_rows,
    replicated,
    vocab_rows,
)
from gpg_megatron.errors import UserError
from gpg_megatron.types import ModelShape


@dataclass(frozen=True, slots=True)
class Rule:
    """A Megatron parameter, the Hugging Face tensors it is made of, and how."""

    megatron: tuple[str, ...]
    """Patterns of the same parameter: local spec first, then Transformer Engine."""
    hf: tuple[str, ...]
    layout: Layout


_LAYER = "decoder.layers.{}."
_HF = "model.layers.{}."

_COMMON = (
    Rule(("embedding.word_embeddings.weight",), ("model.embed_tokens.weight",), vocab_rows),
    Rule(("decoder.final_layernorm.weight",), ("model.norm.weight",), replicated),
    Rule(
        (
            _LAYER + "input_layernorm.weight",
            _LAYER + "self_attention.linear_qkv.layer_norm_weight",
        ),
        (_HF + "input_layernorm.weight",),
        replicated,
    ),
    Rule(
        (_LAYER + "self_attention.linear_qkv.weight",),
        tuple(f"{_HF}self_attn.{x}_proj.weight" for x in "qkv"),
        qkv_rows,
    ),
    Rule(
        (_LAYER + "self_attention.linear_proj.weight",),
        (_HF + "self_attn.o_proj.weight",),
        columns,
    ),
    Rule(
        (_LAYER + "pre_mlp_layernorm.weight", _LAYER + "mlp.linear_fc1.layer_norm_weight"),
        (_HF + "post_attention_layernorm.weight",),
        replicated,
    ),
    Rule(
        (_LAYER + "mlp.linear_fc1.weight",),
        (_HF + "mlp.gate_proj.weight", _HF + "mlp.up_proj.weight"),
        gated_rows,
    ),
    Rule((_LAYER + "mlp.linear_fc2.weight",), (_HF + "mlp.down_proj.weight",), columns),
)
_QKV_BIAS = (
    Rule(
        (_LAYER + "self_attention.linear_qkv.bias",),
        tuple(f"{_HF}self_attn.{x}_proj.bias" for x in "qkv"),
        qkv_rows,
    ),
)
_QK_NORM = tuple(
    Rule(
        (f"{_LAYER}self_attention.{x}_layernorm.weight",),
        (f"{_HF}self_attn.{x}_norm.weight",),
        replicated,
    )
    for x in "qk"
)
# Under pipeline parallelism the last stage of a tied model holds a copy of the embedding.
_TIED_HEAD = (Rule(("output_layer.weight",), ("model.embed_tokens.weight",), vocab_rows),)
_HEAD = (Rule(("output_layer.weight",), ("lm_head.weight",), vocab_rows),)


def rules_of(model: ModelShape) -> tuple[Rule, ...]:
    """The rows of the table that a model uses."""
    return (
        _COMMON
        + (_QKV_BIAS if model.qkv_bias else ())
        + (_QK_NORM if model.qk_norm else ())
        + (_TIED_HEAD if model.tied else _HEAD)
    )


def pieces_of(name: str, shard: Shard, model: ModelShape) -> list[Piece]:
    """What one Megatron parameter shard holds, in Hugging Face coordinates.

    Args:
        name: global parameter name, with the layer number of the whole model.

    Raises:
        UserError: no row of the table names this parameter.
    """
    pattern, layer = _split_layer(name)
    for rule in rules_of(model):
        if pattern in rule.megatron:
            return rule.layout([hf.format(layer) for hf in rule.hf], shard, model)
    raise UserError(
        f"{model.architecture}: no layout rule for Megatron parameter {name!r}; "
        f"gpg_megatron/bridge/families.py needs a row for it"
    )


def hf_names(model: ModelShape) -> list[str]:
    """Every tensor name that a Hugging Face checkpoint of the model has, in layer order."""
    names: dict[str, None] = {}
    for rule in rules_of(model):
        layers = range(model.num_layers) if "{}" in rule.hf[0] else [0]
        names.update(dict.fromkeys(hf.format(layer) for layer in layers for hf in rule.hf))
    return list(names)


def _split_layer(name: str) -> tuple[str, str]:
    """("decoder.layers.{}.x", "7") for "decoder.layers.7.x"; the number is "" without one."""
    match = re.match(r"(decoder\.layers\.)(\d+)(\..+)", name)
    return (f"{match[1]}{{}}{match[3]}", match[2]) if match else (name, "")
