"""Read a Hugging Face directory's config.json into a ModelShape, without importing transformers.

Every policy rank needs the shape, and importing transformers costs each of them seconds.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpg_megatron.config.sections import Config, PolicyConfig
from gpg_megatron.errors import UserError
from gpg_megatron.types import ModelShape, MoEShape


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What an architecture has that its config.json does not spell out."""

    qkv_bias: bool = False
    qk_norm: bool = False
    experts: bool = False
    """In every layer."""
    shared_expert: bool = False


# A further family also needs its rows in bridge/families.py.
FAMILIES = {
    "Qwen2ForCausalLM": Family(qkv_bias=True),
    "Qwen3ForCausalLM": Family(qk_norm=True),
    "LlamaForCausalLM": Family(),
    "MistralForCausalLM": Family(),
    "Qwen2MoeForCausalLM": Family(qkv_bias=True, experts=True, shared_expert=True),
    "Qwen3MoeForCausalLM": Family(qk_norm=True, experts=True),
}


def load_model_shape(path: str | Path, *, need_weights: bool = True) -> ModelShape:
    """The shape of the model in a Hugging Face directory.

    Args:
        need_weights: whether there must be *.safetensors files.

    Raises:
        UserError: the directory or its files are missing, or the architecture (or one of its
            options) is not supported.
    """
    directory = Path(path)
    if not directory.is_dir():
        raise UserError(f"model.path: no such directory: {path}")
    try:
        raw = json.loads((directory / "config.json").read_text())
    except FileNotFoundError:
        raise UserError(f"model.path: {path} has no config.json") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{directory / 'config.json'}:{error.lineno}: {error.msg}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{directory / 'config.json'}: expected a JSON object")
    if need_weights and not any(directory.glob("*.safetensors")):
        raise UserError(f"model.path: {path} has no *.safetensors files")
    return _shape(raw, directory / "config.json")


def _shape(raw: dict[str, Any], where: Path) -> ModelShape:
    architecture = (raw.get("architectures") or ["(none)"])[0]
    if architecture not in FAMILIES:
        raise UserError(
            f"{where}: architecture {architecture} is not supported; known: {', '.join(FAMILIES)}"
        )
    family = FAMILIES[architecture]
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    for option, unsupported in _options(raw, architecture, rope):
        if unsupported:
            raise UserError(f"{where}: {option} is not supported")
    try:
        heads = raw["num_attention_heads"]
        moe = _experts(raw, family) if family.experts else None
        # Models with experts need not have one; no layer of theirs uses it.
        unused = {"intermediate_size": moe.ffn_size} if moe else {}
        return ModelShape(
            architecture=architecture,
            num_layers=raw["num_hidden_layers"],
            hidden_size=raw["hidden_size"],
            ffn_size=(unused | raw)["intermediate_size"],
            num_heads=heads,
            num_kv_heads=raw.get("num_key_value_heads") or heads,
            head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
            vocab_size=raw["vocab_size"],
            tied=raw.get("tie_word_embeddings", False),
            qkv_bias=family.qkv_bias,
            qk_norm=family.qk_norm,
            rope_theta=float(rope.get("rope_theta", raw.get("rope_theta", 10000.0))),
            rms_norm_eps=raw["rms_norm_eps"],
            max_position_embeddings=raw["max_position_embeddings"],
            moe=moe,
        )
    except KeyError as error:
        raise UserError(f"{where}: key {error} is missing") from None


def _options(
    raw: dict[str, Any], architecture: str, rope: dict[str, Any]
) -> tuple[tuple[str, Any], ...]:
    """(what a model may ask for, whether this one does) for all that is not supported."""
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    # Without the key transformers and the engine take 4096.
    window = raw.get("sliding_window", 4096) if architecture == "MistralForCausalLM" else None
    topk_one = raw.get("num_experts_per_tok") == 1 and bool(raw.get("norm_topk_prob"))
    return (
        (f"rope type {rope_type}", rope_type != "default"),
        ("attention_bias", not FAMILIES[architecture].qkv_bias and raw.get("attention_bias")),
        ("mlp_bias", raw.get("mlp_bias")),
        ("use_sliding_window", raw.get("use_sliding_window")),
        (f"sliding_window {window} (other than null)", window is not None),
        ("hidden_act other than silu", raw.get("hidden_act", "silu") != "silu"),
        ("qkv_bias other than true", not raw.get("qkv_bias", True)),
        ("decoder_sparse_step other than 1", raw.get("decoder_sparse_step", 1) != 1),
        ("mlp_only_layers", bool(raw.get("mlp_only_layers"))),
        # The only expert would have the constant weight 1, and its router no gradient.
        ("norm_topk_prob with one expert per token", topk_one),
    )


def _experts(raw: dict[str, Any], family: Family) -> MoEShape:
    """Raises KeyError."""
    return MoEShape(
        # transformers 5 writes a key of its own, and reads both.
        num_experts=raw.get("num_local_experts") or raw["num_experts"],
        experts_per_token=raw["num_experts_per_tok"],
        ffn_size=raw["moe_intermediate_size"],
        shared_ffn_size=raw["shared_expert_intermediate_size"] if family.shared_expert else 0,
        renormalised=raw.get("norm_topk_prob", False),
    )


def check_layout(config: Config, shape: ModelShape) -> None:
    """The parallel sizes against the model. Raises UserError with the legal values."""
    check_policy_layout(config, shape)
    check_engines(config, shape)


def check_engines(config: Config, shape: ModelShape) -> None:
    """The engines' parallel size and the longest sequence. Raises UserError with what is legal."""
    _check_tensor_parallel("rollout", config.rollout.tensor_model_parallel_size, shape, engine=True)
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
    pipeline_stages(config.policy, shape.num_layers)


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
    # The engine copies key-value heads; Megatron cuts the rows of the fused projection.
    if not engine and (heads + 2 * kv_heads) * shape.head_dim % size:
        return f"does not divide the {(heads + 2 * kv_heads) * shape.head_dim} rows of q, k and v"
    if engine and shape.moe and size > shape.num_experts:
        return f"is more than the model's {shape.num_experts} experts"
    for key, width in _ffn_sizes(shape).items():
        if width % size:
            return f"does not divide the model's {key} {width}"
    return None


def _ffn_sizes(shape: ModelShape) -> dict[str, int]:
    """The sizes that tensor parallelism cuts, under their keys in config.json."""
    if shape.moe is None:
        return {"intermediate_size": shape.ffn_size}
    return {
        "moe_intermediate_size": shape.moe.ffn_size,
        "shared_expert_intermediate_size": shape.moe.shared_ffn_size,
    }


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


def pipeline_stages(policy: PolicyConfig, num_layers: int) -> tuple[int, ...]:
    """The pipeline stage of each layer: even, but for a first or last stage of a given size.

    Raises:
        UserError: the layers do not fit.
    """
    pp = policy.pipeline_model_parallel_size
    first = policy.num_layers_in_first_pipeline_stage
    last = policy.num_layers_in_last_pipeline_stage
    ends = [n for n in (first, last) if n is not None]
    middle, stages = num_layers - sum(ends), pp - len(ends)
    fits = middle >= stages and middle % stages == 0 if stages > 0 else middle == 0
    if not fits or (pp == 1 and ends):
        raise UserError(
            f"policy.pipeline_model_parallel_size={pp} does not divide the model's "
            f"{num_layers} layers; set policy.num_layers_in_first_pipeline_stage or "
            f"policy.num_layers_in_last_pipeline_stage for an uneven layout that adds up"
        )
    sizes = [middle // max(1, stages)] * pp
    sizes[0], sizes[-1] = first or sizes[0], last or sizes[-1]
    return tuple(stage for stage, n in enumerate(sizes) for _ in range(n))


def padded_vocab_size(shape: ModelShape, tensor_parallel_size: int) -> int:
    """Embedding rows on the Megatron side: a multiple of 128 * TP, Megatron-LM's default."""
    unit = 128 * tensor_parallel_size
    return -(-shape.vocab_size // unit) * unit
