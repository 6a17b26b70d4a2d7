"""The project's own modules inside Megatron's transformer layer, and the layer spec.

Megatron's local spec has a norm that refuses sequence parallelism and an attention that knows
no packed sequences. The norm is replaced here, the attention in attention.py. Transformer
Engine, where present, brings its own norms and matrix products.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
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
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
)

from gpg_megatron.policy.attention import PackedAttention
from gpg_megatron.policy.transformer_engine import has_transformer_engine
from gpg_megatron.types import ModelShape


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm over the last dimension, statistics in fp32 (arXiv 1910.07467): on
    CUDA one kernel, which keeps its input in the model's type.

    The product with the weight is taken after the cast back, as Hugging Face and vLLM do.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__()
        weight: Any = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # Megatron then sums its gradient over the tensor-parallel ranks: each saw other tokens.
        weight.sequence_parallel = config.sequence_parallel
        self.weight: torch.nn.Parameter = weight
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * F.rms_norm(x, x.shape[-1:], eps=self.eps)


class Attention(SelfAttention):  # type: ignore[misc]  # Megatron has no types
    """Whose output projection has a bias or not, whatever the MLP has: Megatron has one switch for
    both."""

    def __init__(
        self, config: TransformerConfig, *args: Any, output_bias: bool, **kwargs: Any
    ) -> None:
        own = copy.copy(config)
        own.add_bias_linear = output_bias
        super().__init__(own, *args, **kwargs)


def layer_spec(
    config: TransformerConfig, shape: ModelShape
) -> ModuleSpec | TransformerBlockSubmodules:
    """This stage's layers: Transformer Engine's norms and products where it is present, else
    ours. Attention is always the project's: Transformer Engine's knows no shared prompts."""
    if has_transformer_engine():
        layer = get_gpt_layer_with_transformer_engine_spec(
            num_experts=config.num_moe_experts,
            moe_grouped_gemm=config.moe_grouped_gemm,
            qk_layernorm=shape.qk_norm,
        )
        attention = layer.submodules.self_attention
        attention.module, attention.submodules.core_attention = Attention, PackedAttention
        attention.params |= {"output_bias": shape.output_bias}
        return layer
    layer = _own_layer(
        shape,
        mlp=_EXPERTS if config.num_moe_experts else _MLP,
        stored_names=_STORED_NORMS[: 1 if config.num_moe_experts else 2],
    )
    count = get_num_layers_to_build(config)
    return TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=RMSNorm)


_LINEARS = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
_MLP = ModuleSpec(module=MLP, submodules=_LINEARS)
# Router, experts, and the shared expert where the configuration has one.
_EXPERTS = ModuleSpec(
    module=MoELayer,
    submodules=MoESubmodules(
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


def _own_layer(
    shape: ModelShape,
    *,
    mlp: ModuleSpec,
    stored_names: Sequence[tuple[str, str]],
) -> ModuleSpec:
    head_norm = RMSNorm if shape.qk_norm else IdentityOp
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(
                module=Attention,
                params={
                    "attn_mask_type": AttnMaskType.causal,
                    "output_bias": shape.output_bias,
                },
                submodules=SelfAttentionSubmodules(
                    linear_qkv=ColumnParallelLinear,
                    core_attention=PackedAttention,
                    linear_proj=RowParallelLinear,
                    q_layernorm=head_norm,
                    k_layernorm=head_norm,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=dict(stored_names),
        ),
    )
