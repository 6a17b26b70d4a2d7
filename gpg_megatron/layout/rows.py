"""The table: one row for each kind of parameter, read in both directions.

`{}` stands for the layer number, a second one for the expert's. Names of the local layer spec
and of Transformer Engine's fused modules are both listed; they mean the same tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

from gpg_megatron.layout.boxes import (
    Layout,
    columns,
    convolution_rows,
    delta_rows,
    gated_rows,
    qkv_rows,
    replicated,
    rows,
    vocab_rows,
)

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
    _row,
    prefixes=("decoder.layers.{}.self_attention.", "model.layers.{}.self_attn."),
    layers="attention",
)
_delta = partial(
    _row,
    prefixes=("decoder.layers.{}.self_attention.", "model.layers.{}.linear_attn."),
    layers="delta",
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


COMMON = (
    _once(
        "embedding.word_embeddings.weight", "model.embed_tokens.weight", vocab_rows, "vocab hidden"
    ),
    _once("decoder.final_layernorm.weight", "model.norm.weight", replicated, "hidden"),
)
ATTENTION = (
    _layer(
        "input_layernorm.weight self_attention.linear_qkv.layer_norm_weight",
        "input_layernorm.weight", replicated, "hidden", layers="attention",
    ),
    _attention(
        "linear_qkv.weight", "q_proj.weight k_proj.weight v_proj.weight", qkv_rows, "qkv hidden"
    ),
    _attention("linear_proj.weight", "o_proj.weight", columns, "hidden q"),
)  # fmt: skip
# Norms belong to no projection here, whatever the layer spec.
LATENT = (
    _layer("input_layernorm.weight", "input_layernorm.weight", replicated, "hidden"),
    _attention(
        "linear_kv_down_proj.weight", "kv_a_proj_with_mqa.weight", replicated, "kv_down hidden"
    ),
    _attention("kv_layernorm.weight", "kv_a_layernorm.weight", replicated, "kv_rank"),
    _attention("linear_kv_up_proj.weight", "kv_b_proj.weight", rows, "kv_up kv_rank"),
    _attention("linear_proj.weight", "o_proj.weight", columns, "hidden values"),
)
COMPRESSED_QUERY = (
    _attention("linear_q_down_proj.weight", "q_a_proj.weight", replicated, "q_rank hidden"),
    _attention("q_layernorm.weight", "q_a_layernorm.weight", replicated, "q_rank"),
    _attention("linear_q_up_proj.weight", "q_b_proj.weight", rows, "q q_rank"),
)
PLAIN_QUERY = (_attention("linear_q_proj.weight", "q_proj.weight", rows, "q hidden"),)
QKV_BIAS = (_attention("linear_qkv.bias", "q_proj.bias k_proj.bias v_proj.bias", qkv_rows, "qkv"),)
OUTPUT_BIAS = (_attention("linear_proj.bias", "o_proj.bias", replicated, "hidden"),)
QK_NORM = (
    _attention("q_layernorm.weight", "q_norm.weight", replicated, "head"),
    _attention("k_layernorm.weight", "k_norm.weight", replicated, "head"),
)
POST_NORMS = (
    _layer(
        "post_self_attn_layernorm.weight",
        "post_self_attn_layernorm.weight", replicated, "hidden",
    ),
    _layer("post_mlp_layernorm.weight", "post_mlp_layernorm.weight", replicated, "hidden"),
)  # fmt: skip
DELTA_PROJECTIONS = (
    _delta(
        "in_proj.weight",
        "in_proj_qkv.weight in_proj_z.weight in_proj_b.weight in_proj_a.weight",
        delta_rows, "delta_in hidden",
    ),
)  # fmt: skip
DELTA_FUSED = (
    _delta(
        "in_proj.weight", "in_proj_qkvz.weight in_proj_ba.weight", delta_rows, "delta_in hidden"
    ),
)  # fmt: skip
DELTA = (
    _layer(
        "input_layernorm.weight", "input_layernorm.weight", replicated, "hidden", layers="delta"
    ),
    _delta("conv_weight", "conv1d.weight", convolution_rows, "delta_qkv one delta_kernel"),
    _delta("dt_bias", "dt_bias", rows, "delta_heads"),
    _delta("A_log", "A_log", rows, "delta_heads"),
    _delta("norm_weight", "norm.weight", replicated, "delta_head"),
    _delta("out_proj.weight", "out_proj.weight", columns, "hidden delta_values"),
)
DENSE_NORM = (
    _dense(
        "pre_mlp_layernorm.weight mlp.linear_fc1.layer_norm_weight",
        "post_attention_layernorm.weight", replicated, "hidden",
    ),
)  # fmt: skip
GATE_AND_UP = (
    _dense(
        "mlp.linear_fc1.weight",
        "mlp.gate_proj.weight mlp.up_proj.weight", gated_rows, "gate_and_up hidden",
    ),
)  # fmt: skip
GATE_UP = (
    _dense(
        "mlp.linear_fc1.weight", "mlp.gate_up_proj.weight", gated_rows, "gate_and_up hidden"
    ),
)  # fmt: skip
DOWN = (_dense("mlp.linear_fc2.weight", "mlp.down_proj.weight", columns, "hidden ffn"),)
MLP_BIAS = (
    _dense("mlp.linear_fc1.bias", "mlp.gate_proj.bias mlp.up_proj.bias", gated_rows, "gate_and_up"),
    _dense("mlp.linear_fc2.bias", "mlp.down_proj.bias", replicated, "hidden"),
)
MOE_MLP = (
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
SHARED_EXPERT = (
    _sparse(
        "mlp.shared_experts.gate_weight",
        "mlp.shared_expert_gate.weight", replicated, "one hidden",
    ),
    *_shared_experts("shared_expert"),
)  # fmt: skip
SHARED_EXPERTS = _shared_experts("shared_experts")
ROUTER_BIAS = (
    _sparse(
        "mlp.router.expert_bias",
        "mlp.gate.e_score_correction_bias", replicated, "experts", is_state=True,
    ),
)  # fmt: skip
# Under pipeline parallelism the last stage of a tied model holds a copy of the embedding.
TIED_HEAD = (_once("output_layer.weight", "model.embed_tokens.weight", vocab_rows, "vocab hidden"),)
HEAD = (_once("output_layer.weight", "lm_head.weight", vocab_rows, "vocab hidden"),)
