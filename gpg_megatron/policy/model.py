"""The Megatron-Core GPTModel of a ModelShape, returning log-probs instead of logits."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    gather_from_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.transformer_config import TransformerConfig

from gpg_megatron.config.sections import MIB, PolicyConfig
from gpg_megatron.host.device import Device
from gpg_megatron.model.pipeline import pipeline_chunks
from gpg_megatron.model.shape import padded_vocab_size
from gpg_megatron.policy.attention import SegmentParams
from gpg_megatron.policy.logprobs import VocabShard, vocab_parallel_logprobs
from gpg_megatron.policy.modules import layer_spec
from gpg_megatron.policy.rope import inverse_frequencies
from gpg_megatron.policy.routing import keep_fp32, router_options
from gpg_megatron.policy.transformer_engine import has_transformer_engine
from gpg_megatron.shapes import ModelShape, YarnScaling


class PolicyModel(GPTModel):  # type: ignore[misc]  # Megatron has no types
    """GPTModel whose last stage returns the log-probabilities of the response tokens.

    Only positions with loss reach the vocabulary projection; the rest of the prompt never
    becomes logits.
    """

    real_vocab_size: int
    """Rows of the embedding that are tokens; the padding rows after them are masked."""
    temperature: float
    """Logits are divided by it, as the engine does when it samples."""
    with_entropy: bool = False
    """Return the entropies of the distributions too: [2, positions], log-probs first."""
    logits_chunk_bytes: int
    """Limit of the logits that are held at once."""

    def _preprocess(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, **kwargs: Any
    ) -> tuple[Any, ...]:
        """Rotary embeddings of each token's own position, and for Megatron's mask of padding what
        Router reads: of this rank's tokens, on every pipeline stage."""
        embedded, rotary, cos, sin, offset, _ = super()._preprocess(
            input_ids, position_ids, **kwargs
        )
        members: torch.Tensor | None = kwargs["packed_seq_params"].members_ST
        if members is not None and self.config.sequence_parallel:
            group = parallel_state.get_tensor_model_parallel_group()
            members = members.chunk(group.size(), dim=1)[group.rank()]
        return embedded, rotary[position_ids[0]], cos, sin, offset, members

    def _postprocess(
        self, hidden_states: torch.Tensor, *, packed_seq_params: SegmentParams, **_: object
    ) -> torch.Tensor:
        """hidden [T, 1, H] -> fp32 [number of positions with loss], or two rows of them,
        with_entropy.

        Stages before the last return the hidden states. A rank has T / cp of them, and under
        sequence parallelism T / cp / tp; the result is that of the whole row.
        """
        if not self.post_process:
            return hidden_states
        if self.config.sequence_parallel:
            # What follows is the same on every tensor-parallel rank, and so is its gradient.
            hidden_states = gather_from_sequence_parallel_region(
                hidden_states, tensor_parallel_output_grad=False
            )
        weight = (
            self.shared_embedding_or_output_weight()
            if self.share_embeddings_and_output_weights
            else self.output_layer.weight
        )
        loss, share = packed_seq_params.loss, packed_seq_params.share
        rows = vocab_parallel_logprobs(
            hidden_states[:, 0].index_select(0, loss.own_N),
            weight,
            loss.labels_N,
            self._vocab_shard(len(weight)),
            with_entropy=self.with_entropy,
        )
        chosen = [row for row in rows if row is not None]
        if share is not None:
            chosen = [share.gather_chosen(row, loss) for row in chosen]
        return torch.stack(chosen) if self.with_entropy else chosen[0]

    def _vocab_shard(self, n_rows: int) -> VocabShard:
        rank = parallel_state.get_tensor_model_parallel_rank()
        return VocabShard(
            first=rank * n_rows,
            n_tokens=max(0, min(n_rows, self.real_vocab_size - rank * n_rows)),
            temperature=self.temperature,
            chunk_bytes=self.logits_chunk_bytes,
            group=(
                parallel_state.get_tensor_model_parallel_group()
                if parallel_state.get_tensor_model_parallel_world_size() > 1
                else None
            ),
        )


def build_model(
    shape: ModelShape,
    config: PolicyConfig,
    *,
    dtype: torch.dtype,
    device: Device,
    temperature: float,
) -> list[DistributedDataParallel]:
    """This rank's chunks of the model, each inside Megatron's DDP; several only with virtual
    pipeline stages. Weights are not loaded yet."""
    megatron_config = _transformer_config(shape, config, dtype, device)
    if isinstance(shape.rope_scaling, YarnScaling):
        _scale_cosine_and_sine(megatron_config, shape.rope_scaling.attention_factor)
    # calculate_per_token_loss makes DDP sum gradients over replicas: the loss weights already
    # hold the global denominator.
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=config.use_distributed_optimizer,
        overlap_grad_reduce=config.overlap_grad_reduce,
    )
    n_chunks = config.virtual_pipeline_model_parallel_size
    chunks = []
    for number in range(n_chunks):
        model = _chunk(shape, megatron_config, number if n_chunks > 1 else None, device)
        model.temperature = temperature
        model.logits_chunk_bytes = config.logits_chunk_mb * MIB
        model.to(device=device, dtype=dtype)
        keep_fp32(model)
        # Buckets are for gradients that nothing else hides; later chunks' hide behind the first's.
        ddp = DistributedDataParallel(
            megatron_config, ddp_config, model, disable_bucketing=number > 0
        )
        chunks.append(ddp)
    if config.overlap_grad_reduce:
        no_sync = [ddp.no_sync for ddp in chunks]
        megatron_config.no_sync_func = no_sync if n_chunks > 1 else no_sync[0]
    return chunks


def _chunk(
    shape: ModelShape, config: TransformerConfig, number: int | None, device: Device
) -> PolicyModel:
    """One of this stage's chunks; None: there is but one."""
    at = {"ignore_virtual": False, "vp_stage": number}
    model = PolicyModel(
        config=config,
        transformer_layer_spec=layer_spec(config, shape, number),
        vocab_size=padded_vocab_size(shape, config.tensor_model_parallel_size),
        max_sequence_length=shape.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(**at),
        post_process=parallel_state.is_pipeline_last_stage(**at),
        share_embeddings_and_output_weights=shape.tied,
        position_embedding_type="rope",
        vp_stage=number,
    )
    _mark_tensor_parallel(model)
    # It would choose this rank's positions; _preprocess takes each token's own.
    model.rotary_pos_emb.cp_group = None
    model.rotary_pos_emb.inv_freq = inverse_frequencies(
        shape.rope_theta, shape.rotary_dim or shape.head_dim, shape.rope_scaling
    ).to(device)
    model.real_vocab_size = shape.vocab_size
    return model


def _scale_cosine_and_sine(config: TransformerConfig, factor: float) -> None:
    """Megatron multiplies both by (0.1 m ln s + 1) / (0.1 n ln s + 1) of attributes s, m and n that
    dense models' configuration does not declare."""
    config.yarn_rotary_scaling_factor = math.exp(10.0)
    config.yarn_mscale, config.yarn_mscale_all_dim = factor - 1.0, 0.0


def _mark_tensor_parallel(model: PolicyModel) -> None:
    """Set the attributes by which the gradient norm tells shards from copies.

    Megatron sets them while it fills the weights at random, which is skipped here.
    """
    split = {VocabParallelEmbedding: 0, ColumnParallelLinear: 0, RowParallelLinear: 1}
    for module in model.modules():
        if type(module) in split and module.weight is not None:
            set_tensor_model_parallel_attributes(module.weight, True, split[type(module)], 1)


# policy.recompute -> keywords of TransformerConfig. A run has decided auto; a model that is not
# trained, as when a checkpoint is converted, keeps nothing.
_RECOMPUTE: dict[str, dict[str, Any]] = {
    "auto": {},
    "none": {},
    "attention": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "layers": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
}


def _transformer_config(
    shape: ModelShape, config: PolicyConfig, dtype: torch.dtype, device: Device
) -> TransformerConfig:
    return TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_size,
        num_attention_heads=shape.num_heads,
        num_query_groups=shape.num_kv_heads,
        kv_channels=shape.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=shape.rms_norm_eps,
        qk_layernorm=shape.qk_norm,
        layernorm_zero_centered_gamma=shape.centred_norms,
        attention_output_gate=shape.output_gate,
        # Where it is a list, Megatron stores each layer under keys of its own.
        linear_attention_freq=(
            [int(i in shape.delta_layers) for i in range(shape.num_layers)] if shape.delta else None
        ),
        rotary_interleaved=shape.rotary_neighbours,
        gated_linear_unit=True,
        activation_func=F.silu,
        # What attention has is its own: modules.Attention.
        add_bias_linear=shape.mlp_bias,
        add_qkv_bias=shape.qkv_bias,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        # Those before and after a token.
        window_size=None if shape.window is None else (shape.window - 1, 0),
        tensor_model_parallel_size=config.tensor_model_parallel_size,
        pipeline_model_parallel_size=config.pipeline_model_parallel_size,
        context_parallel_size=config.context_parallel_size,
        **_pipeline_options(shape, config, device),
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        variable_seq_lengths=True,
        # Megatron refuses to train experts under tensor parallelism without it: each token
        # would reach them once from every rank.
        sequence_parallel=config.tensor_model_parallel_size > 1
        and (config.sequence_parallel or shape.moe is not None),
        **_RECOMPUTE[config.recompute],
        **_expert_options(shape, config),
        calculate_per_token_loss=True,
        perform_initialization=False,
        use_cpu_initialization=device == "cpu",
        masked_softmax_fusion=False,
        # The gated linear unit keeps its input alone: on CUDA in one kernel of Megatron, else by
        # gated_unit: "te" stands for a function of one's own. Of Transformer Engine one for rotary
        # embeddings. Kernels round in other places than the CPU's operations.
        bias_activation_fusion=device == "cuda",
        use_te_activation_func=device == "cpu",
        # Our sum on_cpu; on CUDA it is a kernel of Apex.
        gradient_accumulation_fusion=device == "cpu",
        apply_rope_fusion=device == "cuda" and has_transformer_engine(),
        bias_dropout_fusion=False,
    )


def _pipeline_options(shape: ModelShape, config: PolicyConfig, device: Device) -> dict[str, Any]:
    """The keywords of TransformerConfig about pipeline stages."""
    is_interleaved = config.virtual_pipeline_model_parallel_size > 1
    options: dict[str, Any] = {
        # Between two interleaved stages a batch would mix up what goes forward and what goes back.
        "overlap_p2p_comm": is_interleaved,
        "batch_p2p_comm": device == "cuda" and not is_interleaved,
    }
    if config.pipeline_model_parallel_size > 1:
        chunks = [["decoder"] * n for n in pipeline_chunks(config, shape.num_layers)]
        chunks[0].insert(0, "embedding")
        chunks[-1].append("loss")
        options["pipeline_model_parallel_layout"] = chunks
    return options


def _expert_options(shape: ModelShape, config: PolicyConfig) -> dict[str, Any]:
    """The keywords of TransformerConfig about experts."""
    # The only dispatcher that Megatron accepts with variable lengths, dense models included.
    options: dict[str, Any] = {"moe_token_dispatcher_type": "alltoall"}
    if shape.moe is None:
        return options
    return options | {
        "num_moe_experts": shape.moe.num_experts,
        "moe_ffn_hidden_size": shape.moe.ffn_size,
        "moe_shared_expert_intermediate_size": shape.moe.shared_ffn_size or None,
        **router_options(shape.moe),
        # The only loss is GPG's.
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        # A list makes Megatron store each layer under keys of its own.
        "moe_layer_freq": (
            [int(i not in shape.dense_layers) for i in range(shape.num_layers)]
            if shape.dense_layers
            else 1
        ),
        "moe_grouped_gemm": has_transformer_engine(),
        "expert_model_parallel_size": config.expert_model_parallel_size,
    }
