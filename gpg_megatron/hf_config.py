"""Read a Hugging Face directory's config.json into a ModelShape, without importing transformers.

Every policy rank needs the shape, and importing transformers costs each of them seconds.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gpg_megatron.config import Config, PolicyConfig
from gpg_megatron.errors import UserError
from gpg_megatron.types import ModelShape

# architecture -> (qkv_bias, qk_norm). A further family also needs its rows in bridge/families.py.
FAMILIES = {
    "Qwen2ForCausalLM": (True, False),
    "Qwen3ForCausalLM": (False, True),
    "LlamaForCausalLM": (False, False),
}


def load_model_shape(path: str | Path) -> ModelShape:
    """The shape of the model in a Hugging Face directory.

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
    if not any(directory.glob("*.safetensors")):
        raise UserError(f"model.path: {path} has no *.safetensors files")
    return _shape(raw, directory / "config.json")


def _shape(raw: dict[str, Any], where: Path) -> ModelShape:
    architecture = (raw.get("architectures") or ["(none)"])[0]
    if architecture not in FAMILIES:
        raise UserError(
            f"{where}: architecture {architecture} is not supported; known: {', '.join(FAMILIES)}"
        )
    qkv_bias, qk_norm = FAMILIES[architecture]
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    for option, unsupported in (
        (f"rope type {rope_type}", rope_type != "default"),
        ("attention_bias", architecture != "Qwen2ForCausalLM" and raw.get("attention_bias")),
        ("mlp_bias", raw.get("mlp_bias")),
        ("use_sliding_window", raw.get("use_sliding_window")),
        ("hidden_act other than silu", raw.get("hidden_act", "silu") != "silu"),
    ):
        if unsupported:
            raise UserError(f"{where}: {option} is not supported")
    try:
        heads = raw["num_attention_heads"]
        return ModelShape(
            architecture=architecture,
            num_layers=raw["num_hidden_layers"],
            hidden_size=raw["hidden_size"],
            ffn_size=raw["intermediate_size"],
            num_heads=heads,
            num_kv_heads=raw.get("num_key_value_heads") or heads,
            head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
            vocab_size=raw["vocab_size"],
            tied=raw.get("tie_word_embeddings", False),
            qkv_bias=qkv_bias,
            qk_norm=qk_norm,
            rope_theta=float(rope.get("rope_theta", raw.get("rope_theta", 10000.0))),
            rms_norm_eps=raw["rms_norm_eps"],
            max_position_embeddings=raw["max_position_embeddings"],
        )
    except KeyError as error:
        raise UserError(f"{where}: key {error} is missing") from None


def check_layout(config: Config, shape: ModelShape) -> None:
    """The parallel sizes against the model. Raises UserError with the legal values."""
    for section, size, has_copies in (
        ("policy", config.policy.tensor_model_parallel_size, False),
        ("rollout", config.rollout.tensor_model_parallel_size, True),
    ):
        problem = _tensor_parallel_problem(shape, size, engine=has_copies)
        if problem:
            legal = [
                n
                for n in range(1, shape.num_heads + 1)
                if not _tensor_parallel_problem(shape, n, engine=has_copies)
            ]
            raise UserError(
                f"{section}.tensor_model_parallel_size={size} {problem}; legal: {legal}"
            )
    pipeline_stages(config.policy, shape.num_layers)
    longest = config.data.max_prompt_length + config.rollout.max_response_length
    if longest > shape.max_position_embeddings:
        raise UserError(
            f"data.max_prompt_length + rollout.max_response_length = {longest} is more than the "
            f"model's max_position_embeddings {shape.max_position_embeddings}"
        )


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
    if shape.ffn_size % size:
        return f"does not divide the model's intermediate_size {shape.ffn_size}"
    return None


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
