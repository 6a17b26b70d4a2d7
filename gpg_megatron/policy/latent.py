"""Attention over compressed keys and values (MLA, DeepSeek-V2, arXiv 2405.04434, section 2.1).

    hidden --down--> latent --norm--> up --> query of each head [plain | rotated]
    hidden --down--> latent --norm--> up --> key [plain] and value of each head
                 \\-> one rotated part, which is the end of every head's key

The small projections down are whole on every tensor-parallel rank, each for its share of the
tokens; those up are cut by heads. Megatron's own module cannot be used: it cuts the small ones,
and takes positions from where a token lies in the row.

Shape legend: T tokens of this rank's part of a row, t its tensor-parallel share of them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.models.common.embeddings import apply_rotary_pos_emb
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import (
    _yarn_get_concentration_factor_from_config,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from gpg_megatron.policy.attention import PackedAttention, SegmentParams
from gpg_megatron.policy.norm import RMSNorm
from gpg_megatron.shapes import ModelShape


class WholeLinear(torch.nn.Module):
    """x W^T, the same W on every tensor-parallel rank."""

    def __init__(self, config: TransformerConfig, n_in: int, n_out: int) -> None:
        super().__init__()
        weight: Any = torch.nn.Parameter(torch.empty(n_out, n_in, dtype=config.params_dtype))
        # Megatron then sums its gradient over the ranks: each saw other tokens.
        weight.sequence_parallel = config.sequence_parallel
        self.weight: torch.nn.Parameter = weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight)


class LatentAttention(MegatronModule):  # type: ignore[misc]  # Megatron has no types
    """Megatron's self attention of a layer, for SegmentParams."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        *,
        shape: ModelShape,
        pg_collection: ProcessGroupCollection,
        **_: Any,
    ) -> None:
        super().__init__(config)
        assert shape.latent is not None
        self.latent, self.head_dim = shape.latent, shape.head_dim
        self.tp_group = pg_collection.tp
        heads, hidden = shape.num_heads, shape.hidden_size
        eps, latent = config.layernorm_epsilon, self.latent
        n_query = heads * shape.head_dim
        if latent.q_rank:
            self.linear_q_down_proj = WholeLinear(config, hidden, latent.q_rank)
            self.q_layernorm = RMSNorm(config, latent.q_rank, eps)
            self.linear_q_up_proj = self._by_heads(latent.q_rank, n_query)
        else:
            self.linear_q_proj = self._by_heads(hidden, n_query)
        n_down = latent.kv_rank + latent.rope_dim
        self.linear_kv_down_proj = WholeLinear(config, hidden, n_down)
        self.kv_layernorm = RMSNorm(config, latent.kv_rank, eps)
        n_up = heads * (shape.head_dim - latent.rope_dim + latent.value_dim)
        self.linear_kv_up_proj = self._by_heads(latent.kv_rank, n_up)
        self.core_attention = PackedAttention(config)
        self.linear_proj = RowParallelLinear(
            heads * latent.value_dim,
            hidden,
            config=config,
            init_method=config.output_layer_init_method,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=True,
            tp_group=self.tp_group,
        )
        self.recompute = (
            config.recompute_granularity == "selective" and "core_attn" in config.recompute_modules
        )

    def _by_heads(self, n_in: int, n_out: int) -> ColumnParallelLinear:
        return ColumnParallelLinear(
            n_in,
            n_out,
            config=self.config,
            init_method=self.config.init_method,
            bias=False,
            tp_group=self.tp_group,
        )

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: None,
        *,
        rotary_pos_emb: torch.Tensor,
        packed_seq_params: SegmentParams,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        """hidden [t, 1, H], angles [T, 1, 1, rotated elements] -> [t, 1, H]."""
        query = self._query(hidden_states, rotary_pos_emb)
        key, value = self._key_and_value(hidden_states, rotary_pos_emb)
        # Kernels want values as wide as keys.
        value = F.pad(value, (0, self.head_dim - self.latent.value_dim))

        def attend(*tensors: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.core_attention(
                *tensors, attention_mask, packed_seq_params=packed_seq_params
            )
            return out

        if self.recompute and self.training:
            out = tensor_parallel.checkpoint(attend, False, query, key, value)
        else:
            out = attend(query, key, value)
        own = out.unflatten(-1, (-1, self.head_dim))[..., : self.latent.value_dim]
        projected: torch.Tensor = self.linear_proj(own.flatten(2))[0]
        return projected, None

    def _query(self, hidden: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
        """[T, 1, heads of this rank, head_dim], times what scores are scaled by beside the usual
        factor."""
        if self.latent.q_rank:
            latent = self.q_layernorm(self.linear_q_down_proj(hidden))
            query = self.linear_q_up_proj(latent)[0]
        else:
            query = self.linear_q_proj(hidden)[0]
        query = query.unflatten(-1, (-1, self.head_dim))
        if self.latent.score_scale != 1.0:
            query = query * self.latent.score_scale
        rope_dim = self.latent.rope_dim
        plain, turned = query.split([self.head_dim - rope_dim, rope_dim], dim=-1)
        return torch.cat([plain, self._rotate(turned, angles)], dim=-1)

    def _key_and_value(
        self, hidden: torch.Tensor, angles: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[T, 1, heads of this rank, head_dim] and [T, 1, heads of this rank, value_dim]."""
        sizes = [self.latent.kv_rank, self.latent.rope_dim]
        latent, turned = self.linear_kv_down_proj(hidden).split(sizes, dim=-1)
        if self.config.sequence_parallel:
            # Every rank goes on with it for heads of its own.
            turned = gather_from_sequence_parallel_region(
                turned.contiguous(), tensor_parallel_output_grad=True, group=self.tp_group
            )
        turned = self._rotate(turned.unsqueeze(2), angles)
        both = self.linear_kv_up_proj(self.kv_layernorm(latent))[0]
        n_plain, n_value = self.head_dim - self.latent.rope_dim, self.latent.value_dim
        plain, value = both.unflatten(-1, (-1, n_plain + n_value)).split([n_plain, n_value], dim=-1)
        key = torch.cat([plain, turned.expand(*plain.shape[:-1], -1)], dim=-1)
        return key, value

    def _rotate(self, heads: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
        rotated: torch.Tensor = apply_rotary_pos_emb(
            heads,
            angles,
            config=self.config,
            mscale=_yarn_get_concentration_factor_from_config(self.config),
        )
        return rotated
