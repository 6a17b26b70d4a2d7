"""What config.json says of attention over compressed keys and values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gpg_megatron.model.json_file import Refusal, shown
from gpg_megatron.model.rope import read_score_scale
from gpg_megatron.shapes import LatentShape


def read_latent(raw: Mapping[str, Any], values: Mapping[str, Any]) -> LatentShape:
    """The ranks and the parts of a head. Raises Refusal."""
    rope_dim, value_dim = values["qk_rope_head_dim"], values["v_head_dim"]
    heads, kv_heads = values["num_attention_heads"], values["num_key_value_heads"]
    if kv_heads not in (heads, None):
        raise Refusal(f"num_key_value_heads is {shown(kv_heads)}; expected {heads}, those of q")
    if rope_dim % 2:
        raise Refusal(f"qk_rope_head_dim is {rope_dim}; rotary embeddings need an even number")
    if raw.get("head_dim", rope_dim) != rope_dim:
        # As transformers writes it; its rotary angles go by it.
        raise Refusal(f"head_dim is {shown(raw['head_dim'])}; expected {rope_dim}, what rotates")
    if value_dim is None or value_dim > latent_head_dim(values):
        raise Refusal(
            f"v_head_dim is {shown(value_dim)}; expected at most qk_nope_head_dim + "
            f"qk_rope_head_dim = {latent_head_dim(values)}"
        )
    return LatentShape(
        q_rank=values["q_lora_rank"] or 0,
        kv_rank=values["kv_lora_rank"],
        rope_dim=rope_dim,
        value_dim=value_dim,
        score_scale=read_score_scale(raw),
    )


def latent_head_dim(values: Mapping[str, Any]) -> int:
    """Elements of a head's query and key."""
    size: int = values["qk_nope_head_dim"] + values["qk_rope_head_dim"]
    return size
