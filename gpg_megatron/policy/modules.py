"""The project's own modules inside Megatron's transformer layer, and the layer spec.

Megatron's local spec has a norm that refuses sequence parallelism and an attention that knows
no packed sequences. Ours are in norm.py, attention.py and latent.py. Transformer
Engine, where present, brings its own norms and matrix products.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    LayerNormImpl,
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)
from megatron.core.utils import get_pg_rank

from gpg_megatron.policy.attention import PackedAttention
from gpg_megatron.policy.delta import GatedDeltaNet
from gpg_megatron.policy.gate import gated_unit
from gpg_megatron.policy.latent import LatentAttention
from gpg_megatron.policy.norm import RMSNorm
from gpg_megatron.policy.routing import Router
from gpg_megatron.policy.transformer_engine import has_transformer_engine
from gpg_megatron.shapes import ModelShape


class Attention(SelfAttention):  # type: ignore[misc]  # Megatron has no types
    """Whose output projection has a bias or not, whatever the MLP has: Megatron has one switch for
    both."""

    def __init__(
        self, config: TransformerConfig, *args: Any, output_bias: bool, **kwargs: Any
    ) -> None:
        own = copy.copy(config)
        own.add_bias_linear = output_bias
        super().__init__(own, *args, **kwargs)

    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> Any:
        """Of the gates those of this rank's heads: where several ranks have the heads of one group,
        Megatron chooses among the queries only."""
        parts = super().get_query_key_value_tensors(*args, **kwargs)
        if self.config.attention_output_gate:
            query, key, value, gate = parts
            n, rank = query.shape[2], get_pg_rank(self.pg_collection.tp)
            shares = gate.shape[2] // n
            return query, key, value, gate[:, :, rank % shares * n :][:, :, :n]
        return parts


class PostNormLayer(TransformerLayer):  # type: ignore[misc]  # Megatron has no types
    """With norms of what attention and MLP give, before it is added."""

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.post_self_attn_layernorm, self.post_mlp_layernorm = (
            RMSNorm(config, config.hidden_size, config.layernorm_epsilon) for _ in range(2)
        )
        self.self_attn_bda = partial(_add_normed, self.post_self_attn_layernorm)
        self.mlp_bda = partial(_add_normed, self.post_mlp_layernorm)


def _add_normed(norm: RMSNorm, training: bool, fused: bool) -> Callable[..., torch.Tensor]:
    """get_bias_dropout_add, of the norm."""
    add = get_bias_dropout_add(training, fused)

    def add_normed(
        output: tuple[torch.Tensor, torch.Tensor | None], residual: torch.Tensor, dropout: float
    ) -> torch.Tensor:
        x, bias = output
        out: torch.Tensor = add((norm(x if bias is None else x + bias), None), residual, dropout)
        return out

    return add_normed


def layer_spec(
    config: TransformerConfig, shape: ModelShape, chunk: int | None
) -> TransformerBlockSubmodules:
    """The layers of one of this stage's chunks (None: there is but one): Transformer Engine's norms
    and products where it is present, else ours. Attention is always the project's: Transformer
    Engine's knows no shared prompts."""
    has_te, first = has_transformer_engine(), get_transformer_layer_offset(config, chunk)
    layer = _te_layer if has_te else _own_layer
    return TransformerBlockSubmodules(
        layer_specs=[
            layer(shape, experts=i not in shape.dense_layers, delta=i in shape.delta_layers)
            for i in range(first, first + get_num_layers_to_build(config, chunk))
        ],
        layer_norm=LayerNormImpl if has_te else RMSNorm,
    )


def _te_layer(shape: ModelShape, *, experts: bool, delta: bool) -> ModuleSpec:
    layer = get_gpt_layer_with_transformer_engine_spec(
        num_experts=shape.num_experts if experts else None,
        moe_grouped_gemm=experts,
        qk_layernorm=shape.qk_norm,
    )
    if experts:
        layer.submodules.mlp.submodules.router = _router(shape)
    if shape.latent is not None:
        layer.submodules.self_attention = _latent(shape)
        layer.submodules.input_layernorm = RMSNorm
        return layer
    attention = layer.submodules.self_attention
    attention.module, attention.submodules.core_attention = Attention, PackedAttention
    attention.params |= {"output_bias": shape.output_bias}
    if delta:
        layer.submodules.input_layernorm = RMSNorm
        layer.submodules.self_attention = _delta_net(shape)
    layer.module = _layer_class(shape)
    return layer


def _delta_net(shape: ModelShape) -> ModuleSpec:
    return ModuleSpec(module=GatedDeltaNet, params={"delta": shape.delta})


def _latent(shape: ModelShape) -> ModuleSpec:
    return ModuleSpec(module=LatentAttention, params={"shape": shape})


def _layer_class(shape: ModelShape) -> type[TransformerLayer]:
    return PostNormLayer if shape.post_norms else TransformerLayer


_LINEARS = MLPSubmodules(
    linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear, activation_func=gated_unit
)
_MLP = ModuleSpec(module=MLP, submodules=_LINEARS)


def _router(shape: ModelShape) -> Callable[..., Router]:
    assert shape.moe is not None
    return partial(Router, routing=shape.moe.routing)


def _experts(shape: ModelShape) -> ModuleSpec:
    """Router, experts, and the shared expert where the configuration has one."""
    return ModuleSpec(
        module=MoELayer,
        submodules=MoESubmodules(
            router=_router(shape),
            experts=ModuleSpec(module=SequentialMLP, submodules=_LINEARS),
            shared_experts=ModuleSpec(module=SharedExpertMLP, submodules=_LINEARS),
        ),
    )


# Checkpoints use Transformer Engine's names, where a norm belongs to the projection after it;
# experts come after a router, and their norm keeps its own.
_STORED_NORMS = (
    ("input_layernorm.", "self_attention.linear_qkv.layer_norm_"),
    ("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_"),
)


def _own_layer(shape: ModelShape, *, experts: bool, delta: bool) -> ModuleSpec:
    stored = _STORED_NORMS[delta or shape.latent is not None : 1 if experts else 2]
    return ModuleSpec(
        module=_layer_class(shape),
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=_own_attention(shape, delta=delta),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=_experts(shape) if experts else _MLP,
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=dict(stored),
        ),
    )


def _own_attention(shape: ModelShape, *, delta: bool) -> ModuleSpec:
    if delta:
        return _delta_net(shape)
    if shape.latent is not None:
        return _latent(shape)
    head_norm = RMSNorm if shape.qk_norm else IdentityOp
    return ModuleSpec(
        module=Attention,
        params={"attn_mask_type": AttnMaskType.causal, "output_bias": shape.output_bias},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=PackedAttention,
            linear_proj=RowParallelLinear,
            q_layernorm=head_norm,
            k_layernorm=head_norm,
        ),
    )
