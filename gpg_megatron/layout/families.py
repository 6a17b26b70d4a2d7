"""Which rows of the table (rows.py) a model has, how large they are, and one tensor of them: both
directions go through pieces_of."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import product

from gpg_megatron.errors import UserError
from gpg_megatron.layout.boxes import Piece, Shard
from gpg_megatron.layout.rows import (
    ATTENTION,
    COMMON,
    COMPRESSED_QUERY,
    DELTA,
    DELTA_FUSED,
    DELTA_PROJECTIONS,
    DENSE_NORM,
    DOWN,
    GATE_AND_UP,
    GATE_UP,
    HEAD,
    LATENT,
    MLP_BIAS,
    MOE_MLP,
    OUTPUT_BIAS,
    PLAIN_QUERY,
    POST_NORMS,
    QK_NORM,
    QKV_BIAS,
    ROUTER_BIAS,
    SHARED_EXPERT,
    SHARED_EXPERTS,
    TIED_HEAD,
    Rule,
)
from gpg_megatron.model.shape import padded_vocab_size
from gpg_megatron.shapes import ModelShape


def rules_of(model: ModelShape) -> tuple[Rule, ...]:
    """The rows of the table that a model uses."""
    dense = DENSE_NORM + (GATE_UP if model.fused_gate_up else GATE_AND_UP) + DOWN
    delta: tuple[Rule, ...] = ()
    if model.delta:
        delta = DELTA + (DELTA_FUSED if model.delta.fused else DELTA_PROJECTIONS)
    return (
        COMMON
        + delta
        + _attention_of(model)
        + (dense if model.dense_layers else ())
        + (MOE_MLP if model.moe else ())
        + _beside_experts(model)
        + (QKV_BIAS if model.qkv_bias else ())
        + (OUTPUT_BIAS if model.output_bias else ())
        + (MLP_BIAS if model.mlp_bias else ())
        + (QK_NORM if model.qk_norm else ())
        + (POST_NORMS if model.post_norms else ())
        + (TIED_HEAD if model.tied else HEAD)
    )


def _attention_of(model: ModelShape) -> tuple[Rule, ...]:
    if model.latent is None:
        return ATTENTION
    return LATENT + (COMPRESSED_QUERY if model.latent.q_rank else PLAIN_QUERY)


def _beside_experts(model: ModelShape) -> tuple[Rule, ...]:
    if model.moe is None or not model.moe.shared_ffn_size:
        return ()
    if model.moe.routing is None:
        return SHARED_EXPERT
    return SHARED_EXPERTS + (ROUTER_BIAS if model.moe.routing.has_bias else ())


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
