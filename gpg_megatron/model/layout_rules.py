"""The parallel sizes of a configuration against a model's shape."""

from __future__ import annotations

from importlib.util import find_spec

from gpg_megatron.config.sections import Config, PolicyConfig
from gpg_megatron.errors import UserError
from gpg_megatron.model.pipeline import pipeline_chunks
from gpg_megatron.shapes import ModelShape

WITH_IMAGES = ("Qwen3_5ForCausalLM", "Qwen3_5MoeForCausalLM")
"""Whose code in vLLM is that of the models of images too."""
QUOTIENT_HEADS = ("Qwen2ForCausalLM", "Qwen2MoeForCausalLM")


def check_layout(config: Config, shape: ModelShape) -> None:
    """The parallel sizes and the longest sequence against the model.

    Raises:
        UserError: with the legal values.
    """
    check_policy_layout(config, shape)
    check_engines(config, shape)


def check_engines(config: Config, shape: ModelShape) -> None:
    """The engines' parallel size and the longest sequence. Raises UserError."""
    _check_tensor_parallel("rollout", config.rollout.tensor_model_parallel_size, shape, engine=True)
    _check_engine_heads(shape)
    if config.rollout.router_replay and shape.moe is None:
        raise UserError(
            f"rollout.router_replay is true, but {shape.architecture} has no experts; expected "
            "false"
        )
    longest = config.data.max_prompt_length + config.rollout.max_response_length
    if longest > shape.max_position_embeddings:
        raise UserError(
            f"data.max_prompt_length + rollout.max_response_length = {longest} is more than the "
            f"model's max_position_embeddings {shape.max_position_embeddings}"
        )


def check_policy_layout(config: Config, shape: ModelShape) -> None:
    """The policy's parallel sizes alone. Raises UserError with the legal values."""
    _check_tensor_parallel("policy", config.policy.tensor_model_parallel_size, shape, engine=False)
    _check_expert_parallel(config.policy, shape)
    _check_balance(config.policy, shape)
    if shape.delta and (n := config.policy.context_parallel_size) > 1:
        raise UserError(
            f"policy.context_parallel_size={n}, but the state of a gated delta net "
            f"({shape.architecture}) goes through the tokens one by one; expected 1"
        )
    pipeline_chunks(config.policy, shape.num_layers)


def check_engine_type(config: Config, shape: ModelShape, device: str) -> None:
    """On a CPU vLLM has gated delta nets in bf16 alone, and what tokens that were guessed were sent
    to is not recorded. Raises UserError."""
    rollout = config.rollout
    if rollout.router_replay and device == "cpu" and "speculative_config" in rollout.engine_args:
        raise UserError(
            "rollout.router_replay is true with rollout.engine_args.speculative_config, which it "
            "cannot follow on CPU; expected one of them"
        )
    if shape.delta and device == "cpu" and config.rollout.dtype != "bf16":
        raise UserError(
            f"rollout.dtype is {config.rollout.dtype}, but on CPU the engine computes the gated "
            f"delta nets of {shape.architecture} in bf16 only; expected bf16"
        )


def check_engine_packages(shape: ModelShape) -> None:
    """What vLLM's code of a model imports, that it does not bring. Raises UserError."""
    if shape.architecture in WITH_IMAGES and find_spec("torchvision") is None:
        raise UserError(
            f"model.path: vLLM's code of {shape.architecture} needs torchvision, which is not "
            "installed; expected the build for this torch"
        )


def _check_engine_heads(shape: ModelShape) -> None:
    """vLLM's code of these families does not read head_dim. Raises UserError."""
    quotient = shape.hidden_size // shape.num_heads
    if shape.architecture in QUOTIENT_HEADS and shape.head_dim != quotient:
        raise UserError(
            f"model.path: head_dim in config.json is {shape.head_dim}; for {shape.architecture} "
            f"the engine knows only hidden_size / num_attention_heads = {quotient}"
        )


def _check_tensor_parallel(section: str, size: int, shape: ModelShape, *, engine: bool) -> None:
    problem = _tensor_parallel_problem(shape, size, engine=engine)
    if problem:
        legal = [
            n
            for n in range(1, shape.num_heads + 1)
            if not _tensor_parallel_problem(shape, n, engine=engine)
        ]
        raise UserError(f"{section}.tensor_model_parallel_size={size} {problem}; legal: {legal}")


def _tensor_parallel_problem(shape: ModelShape, size: int, *, engine: bool) -> str | None:
    """Why a model cannot be cut into `size` parts; None when it can."""
    heads, kv_heads = shape.num_heads, shape.num_kv_heads
    if heads % size:
        return f"does not divide the model's {heads} attention heads"
    if kv_heads % size and size % kv_heads:
        return (
            f"fits neither way into the model's {kv_heads} key-value heads; one must divide the "
            f"other"
        )
    if shape.delta and shape.delta.key_heads % size:
        return f"does not divide the model's linear_num_key_heads {shape.delta.key_heads}"
    # The engine copies key-value heads; Megatron cuts the rows of the fused projection.
    rows = (heads * (1 + shape.output_gate) + 2 * kv_heads) * shape.head_dim
    if not engine and rows % size:
        return f"does not divide the {rows} rows of q, k and v"
    if engine and shape.moe and size > shape.num_experts:
        return f"is more than the model's {shape.num_experts} experts"
    for key, width in _ffn_sizes(shape).items():
        if width % size:
            return f"does not divide the model's {key} {width}"
    return None


def _ffn_sizes(shape: ModelShape) -> dict[str, int]:
    """The sizes that tensor parallelism cuts, under their keys in config.json."""
    sizes = {"intermediate_size": shape.ffn_size} if shape.dense_layers else {}
    if shape.moe is not None:
        sizes["moe_intermediate_size"] = shape.moe.ffn_size
        sizes["shared_expert_intermediate_size"] = shape.moe.shared_ffn_size
    return sizes


def _check_expert_parallel(policy: PolicyConfig, shape: ModelShape) -> None:
    """Raises UserError."""
    size, replicas = policy.expert_model_parallel_size, policy.data_parallel_size
    if shape.moe is None and size > 1:
        raise UserError(
            f"policy.expert_model_parallel_size={size}, but {shape.architecture} has no experts; "
            f"expected 1"
        )
    if shape.moe and policy.context_parallel_size > 1:
        raise UserError(
            f"policy.context_parallel_size={policy.context_parallel_size}, but "
            f"{shape.architecture} has experts; expected 1"
        )
    if shape.moe and shape.num_experts % size:
        legal = [n for n in range(1, replicas + 1) if not (shape.num_experts % n or replicas % n)]
        raise UserError(
            f"policy.expert_model_parallel_size={size} does not divide the model's "
            f"{shape.num_experts} experts; legal: {legal}"
        )


def _check_balance(policy: PolicyConfig, shape: ModelShape) -> None:
    """Raises UserError."""
    if policy.moe_aux_loss_coeff and shape.moe is None:
        raise UserError(
            f"policy.moe_aux_loss_coeff={policy.moe_aux_loss_coeff:g}, but {shape.architecture} "
            f"has no experts; expected 0"
        )
    has_bias = shape.moe and shape.moe.routing and shape.moe.routing.has_bias
    if policy.moe_router_bias_update_rate and not has_bias:
        raise UserError(
            f"policy.moe_router_bias_update_rate={policy.moe_router_bias_update_rate:g}, but no "
            f"router of {shape.architecture} has a bias; expected 0"
        )
