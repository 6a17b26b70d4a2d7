"""The table: one row for each kind of parameter, read in both directions.

`{}` stands for the layer number, a second one for the expert's. Names of the local layer spec
and of Transformer Engine's fused modules are both listed; they mean the same tensor.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from gpg_megatron.errors import UserError
from gpg_megatron.layout.boxes import (
    Layout,
    Piece,
    Shard,
    columns,
    gated_rows,
    qkv_rows,
    replicated,
    vocab_rows,
)
from gpg_megatron.model.shape import padded_vocab_size
from gpg_megatron.types import ModelShape


@dataclass(frozen=True, slots=True)
class Rule:
    """A Megatron parameter, the Hugging Face tensors it is made of, and how."""

    megatron: tuple[str, ...]
    """Patterns of the same parameter: local spec first, then Transformer Engine."""
    hf: tuple[str, ...]
    layout: Layout
    dims: tuple[str, ...]
    """Of the whole Megatron parameter: keys of dimensions()."""

    @property
    def pattern(self) -> str:
        """The local spec's name."""
        return self.megatron[0]

    @property
    def per_layer(self) -> bool:
        """Whether every layer has one."""
        return "{}" in self.pattern

    @property
    def per_expert(self) -> bool:
        """Whether every expert of every layer has one; expert parallelism spreads them."""
        return self.pattern.count("{}") == 2

    @property
    def at_end(self) -> bool:
        """Whether it is on the last pipeline stage, for a parameter outside the layers."""
        return not self.pattern.startswith("embedding.")


_LAYER = "decoder.layers.{}."
_HF = "model.layers.{}."
_EXPERT = _LAYER + "mlp.experts."
_HF_EXPERT = _HF + "mlp.experts.{}."
_SHARED = _LAYER + "mlp.shared_experts."
_HF_SHARED = _HF + "mlp.shared_expert."


def _gate_and_up(prefix: str) -> tuple[str, ...]:
    return (prefix + "gate_proj.weight", prefix + "up_proj.weight")


_COMMON = (
    Rule(
        ("embedding.word_embeddings.weight",),
        ("model.embed_tokens.weight",),
        vocab_rows,
        ("vocab", "hidden"),
    ),
    Rule(("decoder.final_layernorm.weight",), ("model.norm.weight",), replicated, ("hidden",)),
    Rule(
        (
            _LAYER + "input_layernorm.weight",
            _LAYER + "self_attention.linear_qkv.layer_norm_weight",
        ),
        (_HF + "input_layernorm.weight",),
        replicated,
        ("hidden",),
    ),
    Rule(
        (_LAYER + "self_attention.linear_qkv.weight",),
        tuple(f"{_HF}self_attn.{x}_proj.weight" for x in "qkv"),
        qkv_rows,
        ("qkv", "hidden"),
    ),
    Rule(
        (_LAYER + "self_attention.linear_proj.weight",),
        (_HF + "self_attn.o_proj.weight",),
        columns,
        ("hidden", "q"),
    ),
)
_DENSE_MLP = (
    Rule(
        (_LAYER + "pre_mlp_layernorm.weight", _LAYER + "mlp.linear_fc1.layer_norm_weight"),
        (_HF + "post_attention_layernorm.weight",),
        replicated,
        ("hidden",),
    ),
    Rule(
        (_LAYER + "mlp.linear_fc1.weight",),
        _gate_and_up(_HF + "mlp."),
        gated_rows,
        ("gate_and_up", "hidden"),
    ),
    Rule(
        (_LAYER + "mlp.linear_fc2.weight",),
        (_HF + "mlp.down_proj.weight",),
        columns,
        ("hidden", "ffn"),
    ),
)
_MOE_MLP = (
    Rule(
        (_LAYER + "pre_mlp_layernorm.weight",),
        (_HF + "post_attention_layernorm.weight",),
        replicated,
        ("hidden",),
    ),
    Rule(
        (_LAYER + "mlp.router.weight",),
        (_HF + "mlp.gate.weight",),
        replicated,
        ("experts", "hidden"),
    ),
    Rule(
        (_EXPERT + "local_experts.{}.linear_fc1.weight", _EXPERT + "linear_fc1.weight{}"),
        _gate_and_up(_HF_EXPERT),
        gated_rows,
        ("expert_gate_and_up", "hidden"),
    ),
    Rule(
        (_EXPERT + "local_experts.{}.linear_fc2.weight", _EXPERT + "linear_fc2.weight{}"),
        (_HF_EXPERT + "down_proj.weight",),
        columns,
        ("hidden", "expert_ffn"),
    ),
)
_SHARED_EXPERT = (
    Rule(
        (_SHARED + "gate_weight",),
        (_HF + "mlp.shared_expert_gate.weight",),
        replicated,
        ("one", "hidden"),
    ),
    Rule(
        (_SHARED + "linear_fc1.weight",),
        _gate_and_up(_HF_SHARED),
        gated_rows,
        ("shared_gate_and_up", "hidden"),
    ),
    Rule(
        (_SHARED + "linear_fc2.weight",),
        (_HF_SHARED + "down_proj.weight",),
        columns,
        ("hidden", "shared_ffn"),
    ),
)
_QKV_BIAS = (
    Rule(
        (_LAYER + "self_attention.linear_qkv.bias",),
        tuple(f"{_HF}self_attn.{x}_proj.bias" for x in "qkv"),
        qkv_rows,
        ("qkv",),
    ),
)
_QK_NORM = tuple(
    Rule(
        (f"{_LAYER}self_attention.{x}_layernorm.weight",),
        (f"{_HF}self_attn.{x}_norm.weight",),
        replicated,
        ("head",),
    )
    for x in "qk"
)
# Under pipeline parallelism the last stage of a tied model holds a copy of the embedding.
_TIED_HEAD = (
    Rule(("output_layer.weight",), ("model.embed_tokens.weight",), vocab_rows, ("vocab", "hidden")),
)
_HEAD = (Rule(("output_layer.weight",), ("lm_head.weight",), vocab_rows, ("vocab", "hidden")),)


def rules_of(model: ModelShape) -> tuple[Rule, ...]:
    """The rows of the table that a model uses."""
    return (
        _COMMON
        + (_MOE_MLP if model.moe else _DENSE_MLP)
        + (_SHARED_EXPERT if model.moe and model.moe.shared_ffn_size else ())
        + (_QKV_BIAS if model.qkv_bias else ())
        + (_QK_NORM if model.qk_norm else ())
        + (_TIED_HEAD if model.tied else _HEAD)
    )


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
    if model.moe:
        sizes |= {
            "experts": model.moe.num_experts,
            "expert_ffn": model.moe.ffn_size,
            "expert_gate_and_up": 2 * model.moe.ffn_size,
            "shared_ffn": model.moe.shared_ffn_size,
            "shared_gate_and_up": 2 * model.moe.shared_ffn_size,
        }
    return sizes


def pieces_of(name: str, shard: Shard, model: ModelShape) -> list[Piece]:
    """What one Megatron parameter shard holds, in Hugging Face coordinates.

    Args:
        name: global parameter name, with the layer (and expert) number of the whole model.

    Raises:
        UserError: no row of the table names this parameter.
    """
    pattern, numbers = _split_numbers(name)
    for rule in rules_of(model):
        if pattern in rule.megatron:
            return rule.layout([hf.format(*numbers) for hf in rule.hf], shard, model)
    raise UserError(
        f"{model.architecture}: no layout rule for Megatron parameter {name!r}; "
        f"gpg_megatron/layout/families.py needs a row for it"
    )


def numberings(rule: Rule, model: ModelShape) -> Iterator[tuple[int, ...]]:
    """The layer and expert numbers under which a row of the table exists."""
    layers: Iterable[int] = range(model.num_layers) if rule.per_layer else ()
    if rule.per_expert:
        yield from ((layer, e) for layer in layers for e in range(model.num_experts))
    else:
        yield from ((layer,) for layer in layers) if rule.per_layer else [()]


_NUMBERS = re.compile(r"(?<=decoder\.layers\.)\d+|(?<=local_experts\.)\d+|(?<=\.weight)\d+$")


def _split_numbers(name: str) -> tuple[str, list[str]]:
    """("decoder.layers.{}.x", ["7"]) for "decoder.layers.7.x"; [] without a layer."""
    return _NUMBERS.sub("{}", name), _NUMBERS.findall(name)
