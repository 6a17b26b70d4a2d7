"""Read a Hugging Face directory's config.json into a ModelShape, without importing transformers.

Every policy rank needs the shape, and importing transformers costs each of them seconds.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gpg_megatron.config import Config
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
    """The parallel sizes against the model. Raises UserError with the nearest legal values."""
    tp = config.policy.tensor_model_parallel_size
    engine_tp = config.rollout.tensor_model_parallel_size
    for key, size in (("policy", tp), ("rollout", engine_tp)):
        if shape.num_heads % size:
            legal = [n for n in range(1, shape.num_heads + 1) if shape.num_heads % n == 0]
            raise UserError(
                f"{key}.tensor_model_parallel_size={size} does not divide the model's "
                f"{shape.num_heads} attention heads; legal: {legal}"
            )
        if shape.num_kv_heads % size and size % shape.num_kv_heads:
            raise UserError(
                f"{key}.tensor_model_parallel_size={size} fits neither way into the model's "
                f"{shape.num_kv_heads} key-value heads; one must divide the other"
            )
        if shape.ffn_size % size:
            raise UserError(
                f"{key}.tensor_model_parallel_size={size} does not divide the model's "
                f"intermediate_size {shape.ffn_size}"
            )
    _check_pipeline(config, shape)
    longest = config.data.max_prompt_length + config.rollout.max_response_length
    if longest > shape.max_position_embeddings:
        raise UserError(
            f"data.max_prompt_length + rollout.max_response_length = {longest} is more than the "
            f"model's max_position_embeddings {shape.max_position_embeddings}"
        )


def _check_pipeline(config: Config, shape: ModelShape) -> None:
    """Layers against pipeline stages, an uneven first or last stage included."""
    pp = config.policy.pipeline_model_parallel_size
    first = config.policy.num_layers_in_first_pipeline_stage
    last = config.policy.num_layers_in_last_pipeline_stage
    fixed = [n for n in (first, last) if n is not None]
    layers, stages = shape.num_layers - sum(fixed), pp - len(fixed)
    if (stages > 0 and (layers < stages or layers % stages)) or (stages <= 0 and layers):
        raise UserError(
            f"policy.pipeline_model_parallel_size={pp} does not divide the model's "
            f"{shape.num_layers} layers; set policy.num_layers_in_first_pipeline_stage or "
            f"policy.num_layers_in_last_pipeline_stage for an uneven layout"
        )


def padded_vocab_size(shape: ModelShape, tensor_parallel_size: int) -> int:
    """Embedding rows on the Megatron side: a multiple of 128 * TP, Megatron-LM's default."""
    unit = 128 * tensor_parallel_size
    return -(-shape.vocab_size // unit) * unit
