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
    gated_rows,
    qkv_rows,
    replicated,
    rows,
    vocab_rows,
)
from gpg_megatron.model.shape import padded_vocab_size
from gpg_megatron.shapes import ModelShape

Layers = Literal["all", "dense", "sparse"]
"""dense: with an MLP; sparse: with experts."""


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
    is_state: bool = False
    """It is not trained, and always of fp32: its last bits decide."""

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
    *,
    is_state: bool = False,
) -> Rule:
    megatron_prefix, hf_prefix = prefixes
    return Rule(
        tuple(megatron_prefix + name for name in megatron.split()),
        tuple(hf_prefix + name for name in hf.split()),
        layout,
        tuple(dims.split()),
        layers,
        is_state,
    )


_once = partial(_row, prefixes=("", ""))
_layer = partial(_row, prefixes=("decoder.layers.{}.", "model.layers.{}."))
_dense = partial(_layer, layers="dense")
_sparse = partial(_layer, layers="sparse")
_attention = partial(
    _row, prefixes=("decoder.layers.{}.self_attention.", "model.layers.{}.self_attn.")
)


def _shared_experts(hf: str) -> tuple[Rule, Rule]:
    """The MLP that every token visits, by its name in a layer's Hugging Face names."""
    prefixes = ("decoder.layers.{}.mlp.shared_experts.", f"model.layers.{{}}.mlp.{hf}.")
    row = partial(_row, prefixes=prefixes, layers="sparse")
    gate_and_up = "gate_proj.weight up_proj.weight"
    return (
        row("linear_fc1.weight", gate_and_up, gated_rows, "shared_gate_and_up hidden"),
        row("linear_fc2.weight", "down_proj.weight", columns, "hidden shared_ffn"),
    )


_COMMON = (
    _once(
        "embedding.word_embeddings.weight", "model.embed_tokens.weight", vocab_rows, "vocab hidden"
    ),
    _once("decoder.final_layernorm.weight", "model.norm.weight", replicated, "hidden"),
)
_ATTENTION = (
    _layer(
        "input_layernorm.weight self_attention.linear_qkv.layer_norm_weight",
        "input_layernorm.weight", replicated, "hidden",
    ),
    _attention(
        "linear_qkv.weight", "q_proj.weight k_proj.weight v_proj.weight", qkv_rows, "qkv hidden"
    ),
    _attention("linear_proj.weight", "o_proj.weight", columns, "hidden q"),
)  # fmt: skip
# Norms belong to no projection here, whatever the layer spec.
_LATENT = (
    _layer("input_layernorm.weight", "input_layernorm.weight", replicated, "hidden"),
    _attention(
        "linear_kv_down_proj.weight", "kv_a_proj_with_mqa.weight", replicated, "kv_down hidden"
    ),
    _attention("kv_layernorm.weight", "kv_a_layernorm.weight", replicated, "kv_rank"),
    _attention("linear_kv_up_proj.weight", "kv_b_proj.weight", rows, "kv_up kv_rank"),
    _attention("linear_proj.weight", "o_proj.weight", columns, "hidden values"),
)
_COMPRESSED_QUERY = (
    _attention("linear_q_down_proj.weight", "q_a_proj.weight", replicated, "q_rank hidden"),
    _attention("q_layernorm.weight", "q_a_layernorm.weight", replicated, "q_rank"),
    _attention("linear_q_up_proj.weight", "q_b_proj.weight", rows, "q q_rank"),
)
_PLAIN_QUERY = (_attention("linear_q_proj.weight", "q_proj.weight", rows, "q hidden"),)
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
    _sparse(
        "mlp.shared_experts.gate_weight",
        "mlp.shared_expert_gate.weight", replicated, "one hidden",
    ),
    *_shared_experts("shared_expert"),
)  # fmt: skip
_SIGMOID = (
    _sparse(
        "mlp.router.expert_bias",
        "mlp.gate.e_score_correction_bias", replicated, "experts", is_state=True,
    ),
    *_shared_experts("shared_experts"),
)  # fmt: skip
# Under pipeline parallelism the last stage of a tied model holds a copy of the embedding.
_TIED_HEAD = (
    _once("output_layer.weight", "model.embed_tokens.weight", vocab_rows, "vocab hidden"),
)
_HEAD = (_once("output_layer.weight", "lm_head.weight", vocab_rows, "vocab hidden"),)


def rules_of(model: ModelShape) -> tuple[Rule, ...]:
    """The rows of the table that a model uses."""
    dense = _DENSE_NORM + (_GATE_UP if model.fused_gate_up else _GATE_AND_UP) + _DOWN
    return (
        _COMMON
        + _attention_of(model)
        + (dense if model.dense_layers else ())
        + (_MOE_MLP if model.moe else ())
        + _beside_experts(model)
        + (_QKV_BIAS if model.qkv_bias else ())
        + (_OUTPUT_BIAS if model.output_bias else ())
        + (_MLP_BIAS if model.mlp_bias else ())
        + (_QK_NORM if model.qk_norm else ())
        + (_POST_NORMS if model.post_norms else ())
        + (_TIED_HEAD if model.tied else _HEAD)
    )


def _attention_of(model: ModelShape) -> tuple[Rule, ...]:
    if model.latent is None:
        return _ATTENTION
    return _LATENT + (_COMPRESSED_QUERY if model.latent.q_rank else _PLAIN_QUERY)


def _beside_experts(model: ModelShape) -> tuple[Rule, ...]:
    if model.moe is None or not model.moe.shared_ffn_size:
        return ()
    return _SIGMOID if model.moe.sigmoid else _SHARED_EXPERT


def dimensions(model: ModelShape, tp_size: int) -> dict[str, int]:
    """What the names in Rule.dims stand for, in elements."""
    sizes = {
        "one": 1,
        "hidden": model.hidden_size,
        "head": model.head_dim,
        "q": model.num_heads * model.head_dim,
        "qkv": (model.num_heads + 2 * model.num_kv_heads) * model.head_dim,
        "ffn": model.ffn_size,
        "gate_and_up": 2 * model.ffn_size,
        "vocab": padded_vocab_size(model, tp_size),
    }
    if model.latent:
        latent = model.latent
        plain = model.head_dim - latent.rope_dim
        sizes |= {
            "q_rank": latent.q_rank,
            "kv_rank": latent.kv_rank,
            "kv_down": latent.kv_rank + latent.rope_dim,
            "kv_up": model.num_heads * (plain + latent.value_dim),
            "values": model.num_heads * latent.value_dim,
        }
    if model.moe:
        sizes |= {
            "experts": model.moe.num_experts,
            "expert_ffn": model.moe.ffn_size,
            "expert_gate_and_up": 2 * model.moe.ffn_size,
            "shared_ffn": model.moe.shared_ffn_size,
            "shared_gate_and_up": 2 * model.moe.shared_ffn_size,
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
    kinds = {
        "all": range(model.num_layers),
        "dense": model.dense_layers,
        "sparse": [i for i in range(model.num_layers) if i not in model.dense_layers],
    }
    layers = [kinds[rule.layers]] if rule.per_layer else []
    experts = [range(model.num_experts)] if rule.per_expert else []
    return product(*layers, *experts)
