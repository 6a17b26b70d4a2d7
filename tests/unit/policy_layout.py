"""Megatron's shards, stacked and cut with numpy from whole Hugging Face tensors.

An independent reading of Megatron's layout: whole parameters are built first, then cut by rows
or columns.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from gpg_megatron.layout.topology import PolicyGrid, local_shapes
from gpg_megatron.shapes import ModelShape

PADDING = -1.0
_HF_NAMES = (
    (r"^embedding\.word_embeddings\.", "model.embed_tokens."),
    (r"^output_layer\.", "lm_head."),
    (r"^decoder\.final_layernorm\.", "model.norm."),
    (r"^decoder\.layers\.", "model.layers."),
    (r"\.pre_mlp_layernorm\.", ".post_attention_layernorm."),
    (r"\.self_attention\.([qk])_layernorm\.", r".self_attn.\1_norm."),
    (r"\.self_attention\.linear_proj\.", ".self_attn.o_proj."),
    (r"\.self_attention\.linear_qkv\.", ".self_attn.{}_proj."),
    (r"\.self_attention\.in_proj\.", ".linear_attn.in_proj_{}."),
    (r"\.self_attention\.conv_weight$", ".linear_attn.conv1d.weight"),
    (r"\.self_attention\.norm_weight$", ".linear_attn.norm.weight"),
    (r"\.self_attention\.(A_log|dt_bias|out_proj)", r".linear_attn.\1"),
    (r"\.mlp\.router\.expert_bias$", ".mlp.gate.e_score_correction_bias"),
    (r"\.mlp\.router\.", ".mlp.gate."),
    (r"\.shared_experts\.gate_weight$", ".shared_expert_gate.weight"),
    (r"\.local_experts\.", "."),
    (r"\.linear_fc1\.", ".{}_proj."),
    (r"\.linear_fc2\.", ".down_proj."),
)


def weights(
    model: ModelShape, grid: PolicyGrid, hf: Mapping[str, np.ndarray], rank: int
) -> dict[str, np.ndarray]:
    """Global Megatron name -> shard of every parameter of a rank; PADDING beyond the vocabulary.

    Only which parameters there are is asked of the code under test.
    """
    tp = rank % grid.tp_size
    return {
        name: _shard(name, model, grid.tp_size, hf, tp) for name in local_shapes(model, grid, rank)
    }


def _shard(
    name: str, model: ModelShape, tp_size: int, hf: Mapping[str, np.ndarray], tp: int
) -> np.ndarray:
    hf_name = name
    for pattern, replacement in _HF_NAMES:
        hf_name = re.sub(pattern, replacement, hf_name)
    if model.moe and not model.moe.routing:
        hf_name = hf_name.replace(".shared_experts.", ".shared_expert.")
    if hf_name == "lm_head.weight" and model.tied:
        hf_name = "model.embed_tokens.weight"
    if "linear_attn" in hf_name and not name.endswith(("norm_weight", "out_proj.weight")):
        return np.split(_delta_net(hf_name, model, hf), tp_size)[tp]
    if "linear_qkv" in name:
        whole = [hf[hf_name.format(letter)] for letter in "qkv"]
        if model.output_gate:  # [query; gate] of each head
            heads = np.split(whole[0], 2 * model.num_heads)
            whole[:1] = [np.concatenate(heads[i::2]) for i in range(2)]
        groups = [np.split(part, model.num_kv_heads) for part in whole]
        fused = [part for group in zip(*groups, strict=True) for part in group]
        return np.split(np.concatenate(fused), tp_size)[tp]
    if "linear_fc1" in name:
        both = hf.get(hf_name.format("gate_up"))
        halves = (
            [hf[hf_name.format(x)] for x in ("gate", "up")] if both is None else np.split(both, 2)
        )
        return np.concatenate([np.split(half, tp_size)[tp] for half in halves])
    tensor = hf[hf_name]
    if re.search("linear_fc2|linear_proj|out_proj", name) and not name.endswith("bias"):
        return np.split(tensor, tp_size, axis=1)[tp]
    if name.startswith(("embedding.", "output_layer.")):
        n_padding = -len(tensor) % (128 * tp_size)
        padding = np.full((n_padding, tensor.shape[1]), PADDING)
        return np.split(np.concatenate([tensor, padding]), tp_size)[tp]
    return tensor


def _delta_net(hf_name: str, model: ModelShape, hf: Mapping[str, np.ndarray]) -> np.ndarray:
    """A parameter of which each rank has a part, by key head."""
    delta = model.delta
    assert delta
    borders = [delta.key_width, 2 * delta.key_width]
    if hf_name.endswith("conv1d.weight"):
        parts = np.split(hf[hf_name], borders)
    elif "{}" not in hf_name:
        return hf[hf_name]
    elif delta.fused:
        parts = [hf[hf_name.format(kind)] for kind in ("qkvz", "ba")]
    else:
        parts = np.split(hf[hf_name.format("qkv")], borders)
        parts += [hf[hf_name.format(kind)] for kind in "zba"]
    heads = [np.split(part, delta.key_heads) for part in parts]
    return np.concatenate([x for head in zip(*heads, strict=True) for x in head])
