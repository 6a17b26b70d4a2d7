"""Read a Hugging Face directory's config.json into a ModelShape, without importing transformers.

Every policy rank needs the shape, and importing transformers costs each of them seconds. What comes
out is what transformers' own configuration says, or an error. A key that we know (hf_keys.py) has a
value that it and we understand alike; the others are named in a warning.

    config.json --read_object--> keys --check each against its row--> ModelShape
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import NoneType
from typing import Any

from gpg_megatron.errors import UserError
from gpg_megatron.model.delta import read_delta
from gpg_megatron.model.families import FAMILIES
from gpg_megatron.model.fp8 import blocks_of
from gpg_megatron.model.hf_keys import LENGTHS, Family, Key, Missing
from gpg_megatron.model.json_file import Refusal, plain, read_object, shown
from gpg_megatron.model.latent import latent_head_dim, read_latent
from gpg_megatron.model.rope import read_rope, read_rotary_dim, unread, without
from gpg_megatron.model.routing import read_extra_layers, read_routed_experts
from gpg_megatron.model.windows import read_window
from gpg_megatron.shapes import ModelShape, MoEShape

_TYPE_WORDS: dict[type, str] = {
    int: "a whole number (without point or quotes)",
    float: "a number with a point or exponent",
    bool: "true or false",
    str: "text",
    list: "a list",
    dict: "an object",
    NoneType: "null",
}


def load_model_shape(
    path: str | Path, *, need_weights: bool = True, may_be_fp8: bool = False
) -> ModelShape:
    """The shape of the model in a Hugging Face directory.

    Args:
        need_weights: whether there must be *.safetensors files.
        may_be_fp8: its weights may be in FP8 with scales of blocks, which conversion reads.

    Raises:
        UserError: the directory or its files are missing, or the architecture (or one of its
            options) is not supported.
    """
    shape, _ = _resolve(path, may_be_fp8=may_be_fp8)
    if need_weights and not any(Path(path).glob("*.safetensors")):
        raise UserError(f"model.path: {path} has no *.safetensors files")
    return shape


def shape_warnings(path: str | Path) -> list[str]:
    """What a person should know of a config.json that load_model_shape takes.

    Raises:
        UserError: it does not take it.
    """
    _, unknown = _resolve(path, may_be_fp8=True)
    if not unknown:
        return []
    names = ", ".join(map(plain, unknown[:10])) + (", ..." if len(unknown) > 10 else "")
    return [f"{Path(path) / 'config.json'}: unknown keys, which have no effect here: {names}"]


def fp8_blocks(path: str | Path) -> tuple[int, int] | None:
    """Rows and columns of the blocks of a model in FP8; None: it is not in FP8."""
    return blocks_of(read_object(Path(path) / "config.json").get("quantization_config"))


def _resolve(path: str | Path, *, may_be_fp8: bool = False) -> tuple[ModelShape, list[str]]:
    """The shape, and the keys that nothing is known of. Raises UserError."""
    directory = Path(path)
    if not directory.is_dir():
        raise UserError(f"model.path: no such directory: {path}")
    where = directory / "config.json"
    if not where.exists():
        raise UserError(f"model.path: {path} has no config.json")
    if (directory / "hf_quant_config.json").exists():
        raise UserError(
            f"{directory / 'hf_quant_config.json'}: quantised weights are not supported"
        )
    raw = read_object(where)
    if may_be_fp8 and blocks_of(raw.get("quantization_config")):
        del raw["quantization_config"]
    try:
        architecture, family = _family_of(raw)
        known = family.declared.keys() | family.extra.keys() | LENGTHS
        text = without(raw, family.unused_angles)
        shape = _shape(architecture, family, text)
    except Refusal as refusal:
        raise UserError(f"{where}: {refusal}") from None
    return shape, sorted(text.keys() - known) + unread(text)


def _family_of(raw: Mapping[str, Any]) -> tuple[str, Family]:
    """transformers goes by model_type, the engine by both. Raises Refusal."""
    names = raw.get("architectures") or ["(none)"]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise Refusal(f"architectures is {shown(names)}; expected a list with a name")
    architecture = names[0]
    if architecture not in FAMILIES:
        raise Refusal(
            f"architecture {plain(architecture)} is not supported; known: {', '.join(FAMILIES)}"
        )
    family = FAMILIES[architecture]
    if raw.get("model_type") not in (family.model_type, *family.other_types):
        found = shown(raw["model_type"]) if "model_type" in raw else "missing"
        raise Refusal(f'model_type is {found}; expected "{family.model_type}" for {architecture}')
    return architecture, family


def _values(raw: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """All keys, with the defaults of those that are absent, checked. Raises Refusal."""
    values: dict[str, Any] = {name: key.default for name, key in family.declared.items()}
    values |= {name: Missing for name, key in family.extra.items() if key.default is Missing}
    if "num_local_experts" in family.extra and "num_local_experts" in raw:
        values["num_experts"] = raw["num_local_experts"]
    values.update(raw)
    for name, key in {**family.extra, **family.declared}.items():
        if values.get(name) is Missing:
            raise Refusal(f"key '{name}' is missing")
        if name in raw or (key.only and name in values):
            _check_value(name, values[name], key)
    for name in sorted(raw.keys() & LENGTHS):
        longest, length = values["max_position_embeddings"], raw[name]
        if length is not None and not (_is_number(length) and length >= longest):
            raise Refusal(
                f"{name} is {shown(length)}; expected max_position_embeddings {longest} or more"
            )
    return values


def _check_value(name: str, value: Any, key: Key) -> None:
    """Raises Refusal."""
    if type(value) not in key.types:
        words = " or ".join(_TYPE_WORDS[t] for t in key.types)
        raise Refusal(f"{name} is {shown(value)}; expected {words}")
    if (
        key.of
        and isinstance(value, list)
        and (wrong := [x for x in value if type(x) not in key.of])
    ):
        words = " or ".join(_TYPE_WORDS[t] for t in key.of)
        raise Refusal(f"{name} has {shown(wrong[0])} in it; expected {words}")
    if key.most and value is not None and not 1 <= value <= key.most:
        raise Refusal(f"{name} is {shown(value)}; expected 1 to {key.most}")
    if key.only and not any(_same(value, x) for x in key.only):
        raise Refusal(f"{_option(name, value, key)} is not supported")


def _option(name: str, value: Any, key: Key) -> str:
    """What a model asks for with a value that it may not have."""
    neutral = key.only[0]
    if key.what:
        return f"{name} ({key.what})"
    if neutral is None:
        return f"{name} {shown(value)} (other than null)"
    return name if neutral in (False, [], {}) else f"{name} other than {plain(neutral)}"


def _shape(architecture: str, family: Family, raw: Mapping[str, Any]) -> ModelShape:
    """Raises Refusal."""
    values = _values(raw, family)
    heads, hidden = values["num_attention_heads"], values["hidden_size"]
    if family.model_type in ("llama", "deepseek_v2") and hidden % heads:
        raise Refusal(f"num_attention_heads {heads} does not divide hidden_size {hidden}")
    head_dim = values.get("head_dim") or hidden // heads
    latent = read_latent(raw, values) if family.latent else None
    if latent is not None:
        head_dim = latent_head_dim(values)
    if head_dim == 0 or head_dim % 2:
        raise Refusal(f"the size of a head is {head_dim}; rotary embeddings need an even number")
    kv_heads = heads if latent else values["num_key_value_heads"] or heads
    if heads % kv_heads:
        default = "" if "num_key_value_heads" in raw else " (the family's default)"
        raise Refusal(
            f"num_key_value_heads {kv_heads}{default} does not divide num_attention_heads {heads}"
        )
    if not 0 < (eps := values["rms_norm_eps"]) < 1:
        raise Refusal(f"rms_norm_eps is {shown(eps)}; expected a number between 0 and 1")
    moe = _experts(family, values)
    dense = values["intermediate_size"] if "intermediate_size" in family.declared else None
    rotary_dim = read_rotary_dim(raw, family.rotary_part, head_dim)
    theta, scaling = read_rope(raw, values["max_position_embeddings"])
    return ModelShape(
        architecture=architecture,
        num_layers=values["num_hidden_layers"],
        hidden_size=hidden,
        ffn_size=dense or (moe.ffn_size if moe else 0),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=values["vocab_size"],
        tied=values["tie_word_embeddings"],
        rotary_dim=latent.rope_dim if latent else rotary_dim,
        **dict.fromkeys(family.has, True),
        **_flags(family, raw, values),
        window=None if family.delta else read_window(family, values),
        delta=read_delta(family, values) if family.delta else None,
        rope_theta=theta,
        rope_scaling=scaling,
        rms_norm_eps=eps,
        max_position_embeddings=values["max_position_embeddings"],
        moe=moe,
        latent=latent,
        extra_layers=read_extra_layers(values) if "num_mtp_layers" in family.declared else 0,
    )


def _flags(family: Family, raw: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, bool]:
    """Fields of ModelShape. Raises Refusal."""
    found = {name: values[key] for name, key in family.flags.items()}
    if found.get("output_bias") and "qkv_bias" in raw:
        # Of q, k and v the engine goes by the one, transformers by the other.
        raise Refusal("qkv_bias beside attention_bias is not supported")
    return found


def _experts(family: Family, values: Mapping[str, Any]) -> MoEShape | None:
    """None: the family has none. Raises Refusal."""
    if family.routing:
        return read_routed_experts(values, has_bias=family.routing == "sigmoid")
    if not family.experts:
        return None
    number = values["num_experts"]
    if "num_local_experts" in family.extra:
        number = values.get("num_local_experts", number)
    shape = MoEShape(
        num_experts=number,
        experts_per_token=values["num_experts_per_tok"],
        ffn_size=values["moe_intermediate_size"],
        shared_ffn_size=values["shared_expert_intermediate_size"] if family.shared_expert else 0,
        renormalised=values.get("norm_topk_prob", True),
        dense_layers=_dense_layers(values) if "mlp_only_layers" in family.declared else (),
    )
    if shape.experts_per_token > shape.num_experts:
        raise Refusal(
            f"num_experts_per_tok {shape.experts_per_token} is more than num_experts "
            f"{shape.num_experts}"
        )
    if shape.experts_per_token == 1 and shape.renormalised:
        # The only expert would have the constant weight 1, and its router no gradient.
        raise Refusal("norm_topk_prob with one expert per token is not supported")
    return shape


def _dense_layers(values: Mapping[str, Any]) -> tuple[int, ...]:
    """Layers without experts, as transformers' and vLLM's code has it. Raises Refusal."""
    number, dense = values["num_hidden_layers"], values["mlp_only_layers"] or []
    for layer in dense:
        if type(layer) is not int or not 0 <= layer < number:
            raise Refusal(f"mlp_only_layers has {shown(layer)}; expected layers 0 to {number - 1}")
    step = values["decoder_sparse_step"]
    found = tuple(i for i in range(number) if i in dense or (i + 1) % step)
    if len(found) == number:
        raise Refusal("decoder_sparse_step and mlp_only_layers leave no layer with experts")
    if found and values["intermediate_size"] is None:
        raise Refusal("key 'intermediate_size' is missing")
    return found


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _same(value: object, other: object) -> bool:
    """Equal, where true is not 1."""
    return value == other and isinstance(value, bool) == isinstance(other, bool)


def padded_vocab_size(shape: ModelShape, tensor_parallel_size: int) -> int:
    """Embedding rows on the Megatron side: a multiple of 128 * TP, Megatron-LM's default."""
    unit = 128 * tensor_parallel_size
    return -(-shape.vocab_size // unit) * unit
