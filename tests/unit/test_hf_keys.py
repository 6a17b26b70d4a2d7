"""The tables of config.json's keys against transformers' own configuration classes."""

from __future__ import annotations

import copy
import dataclasses
import json
import random
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpg_megatron.errors import UserError
from gpg_megatron.model.families import FAMILIES
from gpg_megatron.model.hf_keys import Family, Key, Missing
from gpg_megatron.model.shape import load_model_shape, shape_warnings
from gpg_megatron.shapes import (
    DeltaShape,
    GroupRouting,
    LatentShape,
    LinearScaling,
    Llama3Scaling,
    ModelShape,
    MoEShape,
    RopeScaling,
    YarnScaling,
)

HEAD = {
    "num_hidden_layers": 3,
    "hidden_size": 96,
    "intermediate_size": 80,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 500,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
}
ROUTED = {
    "n_routed_experts": 12,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "routed_scaling_factor": 1.5,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "head_dim": 16,
}
LATENT: dict[str, Any] = {
    "num_key_value_heads": None,
    "q_lora_rank": 20,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 14,
    "rms_norm_eps": 1e-6,
    "head_dim": 8,
}
MOE = {"num_experts": 12, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
ARCHITECTURES = pytest.mark.parametrize("architecture", FAMILIES)


def base(architecture: str) -> dict[str, Any]:
    """A config.json of a family with what it must have."""
    family = FAMILIES[architecture]
    raw: dict[str, Any] = HEAD | {"architectures": [architecture], "model_type": family.model_type}
    if family.experts:
        raw |= MOE
    if family.routing:
        raw |= ROUTED
    if family.latent:
        raw |= LATENT
    if family.model_type == "deepseek_v3":
        raw |= {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}
    if family.shared_expert:
        raw["shared_expert_intermediate_size"] = 72
    if family.delta:
        raw["layer_types"] = ["linear_attention", "full_attention", "linear_attention"]
    return raw | ({"sliding_window": None} if family.model_type == "mistral" else {})


def write(directory: Path, raw: object) -> Path:
    (directory / "config.json").write_text(json.dumps(raw))
    return directory


def shape_of(directory: Path) -> ModelShape | str:
    """The shape, or the words of the refusal."""
    try:
        return load_model_shape(directory, need_weights=False)
    except UserError as error:
        assert str(error).startswith(f"{directory / 'config.json'}:") and "\n" not in str(error)
        str(error).encode()
        return str(error)


def theirs(directory: Path) -> Any:
    """transformers' object; the exception where it makes none."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # of several kinds, some of them of huggingface_hub
        return error


def as_shape(config: Any, architecture: str) -> ModelShape:
    """transformers' object, as its model's code reads it."""
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import yarn_apply_mscale

    family = FAMILIES[architecture]
    moe = None
    if family.experts:
        moe = MoEShape(
            num_experts=config.num_experts,
            experts_per_token=config.num_experts_per_tok,
            ffn_size=config.moe_intermediate_size,
            shared_ffn_size=config.shared_expert_intermediate_size if family.shared_expert else 0,
            renormalised=getattr(config, "norm_topk_prob", True),
            dense_layers=tuple(
                i
                for i in range(config.num_hidden_layers)
                if "mlp_only_layers" in family.declared
                and (i in config.mlp_only_layers or (i + 1) % config.decoder_sparse_step)
            ),
        )
    if family.routing:
        moe = MoEShape(
            num_experts=config.n_routed_experts,
            experts_per_token=config.num_experts_per_tok,
            ffn_size=config.moe_intermediate_size,
            shared_ffn_size=config.n_shared_experts * config.moe_intermediate_size,
            renormalised=family.routing == "sigmoid",
            dense_layers=tuple(range(config.first_k_dense_replace)),
            routing=GroupRouting(
                has_bias=family.routing == "sigmoid",
                n_groups=config.n_group,
                chosen_groups=config.topk_group,
                scale=config.routed_scaling_factor,
            ),
        )
    glm_moe = family.model_type == "glm4_moe"
    llama, glm = family.model_type == "llama", family.model_type == "glm4"
    says_bias = llama or glm or glm_moe
    qkv_bias = config.attention_bias if says_bias else family.model_type.startswith("qwen2")
    quotient = config.hidden_size // config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or quotient
    rotary_dim = None
    if family.rotary_part:
        rotary_dim = int(head_dim * config.rope_parameters["partial_rotary_factor"])
    latent = None
    if family.latent:
        head_dim, rotary_dim = config.qk_head_dim, config.qk_rope_head_dim
        latent = LatentShape(
            q_rank=config.q_lora_rank or 0,
            kv_rank=config.kv_lora_rank,
            rope_dim=config.qk_rope_head_dim,
            value_dim=config.v_head_dim,
            score_scale=yarn_apply_mscale(config.rope_parameters, 1.0),
        )
    return ModelShape(
        architecture=config.architectures[0],
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        ffn_size=(
            config.intermediate_size
            if "intermediate_size" in family.declared
            else config.moe_intermediate_size
        ),
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        vocab_size=config.vocab_size,
        tied=config.tie_word_embeddings,
        qkv_bias=qkv_bias,
        output_bias=llama and config.attention_bias,
        mlp_bias=llama and config.mlp_bias,
        qk_norm=family.model_type.startswith("qwen3") or (glm_moe and config.use_qk_norm),
        post_norms=glm,
        fused_gate_up=glm,
        rotary_neighbours=glm or family.latent,
        rotary_dim=rotary_dim,
        output_gate=family.delta,
        centred_norms=family.delta,
        delta=as_delta(config, architecture) if family.delta else None,
        window=as_window(config, family),
        rope_theta=config.rope_parameters["rope_theta"],
        rope_scaling=as_scaling(config.rope_parameters),
        rms_norm_eps=config.rms_norm_eps,
        max_position_embeddings=config.max_position_embeddings,
        moe=moe,
        latent=latent,
        extra_layers=getattr(config, "num_mtp_layers", 0),
    )


def as_delta(config: Any, architecture: str) -> DeltaShape:
    types = enumerate(config.layer_types)
    return DeltaShape(
        layers=tuple(i for i, kind in types if kind == "linear_attention"),
        key_heads=config.linear_num_key_heads,
        value_heads=config.linear_num_value_heads,
        key_dim=config.linear_key_head_dim,
        value_dim=config.linear_value_head_dim,
        kernel=config.linear_conv_kernel_dim,
        fused=architecture == "Qwen3NextForCausalLM",
    )


def as_window(config: Any, family: Family) -> int | None:
    if family.delta:
        return None
    if "layer_types" in family.declared and "sliding_attention" not in config.layer_types:
        return None
    window: int | None = config.sliding_window if "sliding_window" in family.declared else None
    return window


def as_scaling(rope: Any) -> RopeScaling | None:
    """What is drawn below: the numbers that transformers has not, its functions derive; they are
    compared in test_rope.py."""
    factor, original = rope.get("factor"), rope.get("original_max_position_embeddings")
    if rope["rope_type"] == "linear":
        return LinearScaling(factor=factor)
    if rope["rope_type"] == "llama3":
        return Llama3Scaling(
            factor=factor,
            low_freq_factor=rope["low_freq_factor"],
            high_freq_factor=rope["high_freq_factor"],
            original_length=original,
        )
    if rope["rope_type"] == "yarn":
        return YarnScaling(
            factor=factor, original_length=original, beta_fast=32, beta_slow=1, truncate=True,
            attention_factor=rope["attention_factor"],
        )  # fmt: skip
    return None


def config_class(architecture: str) -> Any:
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[FAMILIES[architecture].model_type]


def json_types(hint: Any) -> set[type]:
    """The types of JSON that a hint of a configuration class allows."""
    if get_origin(hint) in (list, dict):
        return {get_origin(hint)}
    if get_args(hint):
        return set().union(*map(json_types, get_args(hint)))
    return {dict} if getattr(hint, "__total__", None) is not None else {hint or NoneType}


@ARCHITECTURES
def test_the_table_has_every_declared_key(architecture: str) -> None:
    """Names, types and defaults. What is Missing here has a default there, of one size of model."""
    fields = {f.name: f for f in dataclasses.fields(config_class(architecture))}
    declared = FAMILIES[architecture].declared
    assert declared.keys() == fields.keys()
    for name, key in declared.items():
        if isinstance(fields[name].type, str):  # of the base class: not checked there
            continue
        types = json_types(fields[name].type)
        # A null that the model's code cannot divide by.
        if (architecture, name) == ("Qwen2MoeForCausalLM", "num_key_value_heads"):
            types -= {NoneType}
        assert set(key.types) == types, name
        if key.default is not Missing and not (key.default is None and key.most):
            assert key.default == fields[name].default, name


# What leaves a model that we support: each is drawn by itself, or the key stays away.
GOOD: dict[str, list[Any]] = {
    "hidden_size": [64, 96, 128],
    "num_attention_heads": [4, 8, 16],
    "rope_theta": [10000, 1e6, 500000.0, 1],
    "rope_scaling": [
        None, {}, {"type": "default"}, {"rope_type": "default", "rope_theta": 7.0},
        {"type": "linear", "factor": 2.0},
        {"rope_type": "yarn", "factor": 16, "attention_factor": 1.5, "rope_theta": 1e4},
        {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4,
            "original_max_position_embeddings": 32,
        },
    ],
    "rope_parameters": [
        None, {}, {"rope_theta": 5e5}, {"rope_type": "default", "rope_theta": 300},
        {"rope_type": "default", "type": "yarn", "partial_rotary_factor": 1.0},
    ],
    "hidden_act": ["silu"],
    "rms_norm_eps": [1e-5, 1e-6],
    "max_position_embeddings": [2048, 131072],
    "attention_dropout": [0, 0.0, 0.1],
    "initializer_range": [0.02, 0.006],
    "use_cache": [True, False],
    "bos_token_id": [None, 1],
    "eos_token_id": [None, 2, [1, 2]],
    "torch_dtype": ["bfloat16", "float32", None],
    "dtype": ["float16"],
    "pruned_heads": [{}],
    "is_encoder_decoder": [False],
    "quantization_config": [None],
    "max_sequence_length": [131072, None],
    "is_causal": [True],
    "temperature": [0.7],
    "something_else": [None, 3, "x", {"a": [1]}],
}  # fmt: skip
DELTA = "qwen3_next qwen3_5_text qwen3_5_moe_text"
GOOD_OF_SOME: dict[str, dict[str, list[Any]]] = {
    "tie_word_embeddings": {"qwen3_next": [False], "": [True, False]},
    "layer_types": {
        DELTA: [["linear_attention", "linear_attention", "full_attention"]],
        "": [["full_attention"] * 3, ["full_attention", "attention", "full_attention"]],
    },
    "linear_num_key_heads": {DELTA: [1, 8], "": []},
    "num_key_value_heads": {
        "qwen2 qwen3 llama": [1, 2, 4, None],
        "deepseek_v2 deepseek_v3": [None],
        "": [1, 2, 4],
    },
    "head_dim": {
        f"qwen3 glm4 glm4_moe {DELTA}": [16, 32],
        "deepseek_v2 deepseek_v3": [8],
        "": [16, 32, None],
    },
    "partial_rotary_factor": {f"glm4 glm4_moe {DELTA}": [0.25, 0.5, 1, 1.0], "": [1.0, 1, None]},
    "attention_bias": {
        "qwen2 qwen2_moe": [True, False, None],
        "llama glm4 glm4_moe": [True, False],
        "": [False],
    },
    "mlp_bias": {"llama": [True, False], "": [False]},
    "qkv_bias": {"qwen2_moe": [True], f"llama mistral {DELTA}": [False], "": [True, False]},
    "use_sliding_window": {"": [False]},
    "sliding_window": {
        f"llama mistral glm4 glm4_moe deepseek_v2 deepseek_v3 {DELTA}": [None],
        "": [None, 64, 0],
    },
    "max_window_layers": {"": [0, 2, 28]},
    "use_qk_norm": {"glm4_moe": [True, False], "": [False]},
    "rms_norm_eps": {"deepseek_v2 deepseek_v3": [1e-6], "": [1e-5, 1e-6]},
    "rope_scaling": {
        "deepseek_v2 deepseek_v3": [None, {}, {"type": "default"}],
        "": GOOD["rope_scaling"],
    },
    "attention_dropout": {"deepseek_v2": [0.0, 0.1], "": GOOD["attention_dropout"]},
}
GOOD_OF_EXPERTS: dict[str, list[Any]] = {
    "norm_topk_prob": [True, False],
    "num_experts_per_tok": [2, 4],
    "num_local_experts": [6, 12],
    "decoder_sparse_step": [1, 2, 3],
    "mlp_only_layers": [None, [], [0]],
    "output_router_logits": [True, False],
    "router_aux_loss_coef": [0.0, 0.01],
}
GOOD_OF_ROUTED: dict[str, list[Any]] = {
    "n_group": [1, 2, 6],
    "n_routed_experts": [12, 24],
    "n_shared_experts": [1, 3],
    "first_k_dense_replace": [0, 2],
    "routed_scaling_factor": [1.0, 2.5],
    "num_nextn_predict_layers": [0, 2],
}


def good_values(architecture: str) -> dict[str, list[Any]]:
    family = FAMILIES[architecture]
    values = dict(GOOD)
    for name, rows in GOOD_OF_SOME.items():
        own = (x for models, x in rows.items() if family.model_type in models.split())
        values[name] = next(own, rows[""])
    values = {name: rows for name, rows in values.items() if rows}
    if family.model_type == "qwen3_5_moe_text":
        values |= GOOD_OF_EXPERTS | {"norm_topk_prob": [True]}
        return values
    values |= GOOD_OF_ROUTED if family.routing else {}
    if family.model_type == "deepseek_v2":
        values |= {"num_nextn_predict_layers": [0, None], "num_experts_per_tok": [1, 3]}
        values |= {"topk_method": ["greedy", "group_limited_greedy"], "n_group": [1]}
    return values | (GOOD_OF_EXPERTS if family.experts else {})


def varied(draw: random.Random, architecture: str) -> dict[str, Any]:
    """A config.json with some keys of other good values, in any order."""
    raw = base(architecture)
    for name, values in good_values(architecture).items():
        if draw.random() < 0.3:
            raw[name] = copy.deepcopy(draw.choice(values))
    if FAMILIES[architecture].model_type == "qwen3_moe" and "num_local_experts" in raw:
        del raw["num_experts"]
    if FAMILIES[architecture].model_type == "llama" and raw.get("attention_bias"):
        raw.pop("qkv_bias", None)
    names = list(raw)
    draw.shuffle(names)
    return {name: raw[name] for name in names}


@ARCHITECTURES
def test_a_good_file_has_the_shape_of_transformers(tmp_path: Path, architecture: str) -> None:
    draw, thetas = random.Random(architecture), set()
    for _ in range(120):
        raw = varied(draw, architecture)
        shape = shape_of(write(tmp_path, raw))
        assert isinstance(shape, ModelShape), (shape, raw)
        config = theirs(tmp_path)
        assert not isinstance(config, Exception), (config, raw)
        assert shape == as_shape(config, architecture), raw
        thetas.add(shape.rope_theta)
        expected = {"something_else"} & raw.keys()
        family = FAMILIES[architecture]
        if family.experts and family.model_type != "qwen3_moe":
            expected |= {"num_local_experts"} & raw.keys()  # Qwen3-MoE's word
        if family.experts and "mlp_only_layers" not in family.declared:
            others = {"decoder_sparse_step", "mlp_only_layers", "intermediate_size"}
            expected |= others & raw.keys()
        assert shape_warnings(tmp_path) == [
            f"{tmp_path / 'config.json'}: unknown keys, which have no effect here: {names}"
            for names in [", ".join(sorted(expected))]
            if names
        ]
    assert len(thetas) > 4


USED = {"use_sliding_window": True, "sliding_window": 64}
SLIDING = {"layer_types": ["sliding_attention"] * 3}
FULL = {"layer_types": ["full_attention"] * 3}


@pytest.mark.parametrize(
    ("family", "keys", "window"),
    [
        ("Mistral", {"sliding_window": 64}, 64),
        ("Mistral", {"sliding_window": 64} | SLIDING, 64),
        ("Qwen2", USED, None),  # max_window_layers is 28
        ("Qwen2", USED | {"max_window_layers": 0}, 64),
        ("Qwen2", USED | SLIDING, 64),
        ("Qwen3", USED | {"max_window_layers": 3}, None),
        ("Qwen3", USED | SLIDING, 64),
        ("Qwen3", USED | FULL, None),
        ("Qwen3", {"use_sliding_window": True, "sliding_window": None}, None),
        ("Qwen2Moe", USED | {"max_window_layers": 0}, None),
        ("Qwen2Moe", USED | SLIDING, 64),
        ("Qwen3Moe", USED, 64),
        ("Qwen3Moe", {"use_sliding_window": False, "sliding_window": 64}, None),
    ],
)
def test_a_window_is_that_of_transformers(
    tmp_path: Path, family: str, keys: dict[str, Any], window: int | None
) -> None:
    architecture = f"{family}ForCausalLM"
    shape = shape_of(write(tmp_path, base(architecture) | keys))
    assert isinstance(shape, ModelShape), shape
    assert shape == as_shape(theirs(tmp_path), architecture) and shape.window == window


JUNK: list[Any] = [
    None, "4", "silu", "", 128.0, 1, 0, -8, True, False, [], [1], {}, {"a": 1}, 10**10, 1e-5,
    10**400, {"rope_type": "linear", "factor": 2.0}, {"rope_theta": None}, {"rope_theta": "5"},
    {"rope_type": None}, {"full_attention": {"rope_theta": 5.0}}, ["sliding_attention"] * 3,
]  # fmt: skip


@ARCHITECTURES
def test_what_transformers_refuses_is_refused(tmp_path: Path, architecture: str) -> None:
    """And what passes, whatever the value, is what transformers sees."""
    draw, outcomes = random.Random(architecture), {True: 0, False: 0}
    names = [*FAMILIES[architecture].declared, "rope_theta", "rope_scaling", "head_dim"]
    for _ in range(150):
        name = draw.choice([x for x in names if x not in ("architectures", "id2label")])
        raw = base(architecture) | {name: draw.choice(JUNK)}
        shape, config = shape_of(write(tmp_path, raw)), theirs(tmp_path)
        if isinstance(shape, ModelShape):
            assert not isinstance(config, Exception), (config, raw)
            assert shape == as_shape(config, architecture), raw
        else:
            assert name in shape or "head" in shape or "rope" in shape, (shape, raw)
        outcomes[isinstance(shape, ModelShape)] += 1
    assert min(outcomes.values()) > 20


@ARCHITECTURES
def test_what_changes_the_function_is_refused_by_name(tmp_path: Path, architecture: str) -> None:
    """Every key that must have one value, with another one."""
    family = FAMILIES[architecture]
    raw, n_refused = base(architecture), 0
    for name, key in {**family.extra, **family.declared}.items():
        if not key.only:
            continue
        other = next(x for x in (True, False, 7, 0.5, "gelu", [1], {"a": 1}) if _differs(x, key))
        message = shape_of(write(tmp_path, raw | {name: other}))
        assert isinstance(message, str), name
        start = f"{tmp_path / 'config.json'}: {name} "
        assert f"{message} ".startswith(start) and message.endswith("is not supported"), message
        n_refused += 1
    assert n_refused > 50


def _differs(value: object, key: Key) -> bool:
    allowed = [(type(x) is bool, x) for x in key.only]
    return type(value) in key.types and (type(value) is bool, value) not in allowed


TEXT = st.text(max_size=6)
SCALARS = (
    st.integers(-2, 200)
    | st.sampled_from([*JUNK, *FAMILIES, 1e999, float("nan"), "default", "\ud800", "a\nb", "\0"])
    | st.floats()
    | TEXT
)
NESTED = SCALARS | st.lists(SCALARS, max_size=3) | st.dictionaries(TEXT, SCALARS, max_size=3)


def changed(architecture: str) -> st.SearchStrategy[dict[str, Any]]:
    """A good config.json with some other values."""
    family = FAMILIES[architecture]
    names = st.sampled_from(sorted({**family.extra, **family.declared})) | TEXT
    changes = st.dictionaries(names, NESTED, max_size=3)
    return changes.map(lambda some: base(architecture) | some)


@pytest.fixture(scope="module")
def one_place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@settings(max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(raw=st.one_of(NESTED, *map(changed, FAMILIES)))
def test_any_file_is_a_shape_or_one_line(one_place: Path, raw: object) -> None:
    shape = shape_of(write(one_place, raw))
    if isinstance(shape, ModelShape):
        for line in shape_warnings(one_place):
            assert "\n" not in line
            line.encode()


@settings(max_examples=300, deadline=None)
@given(content=st.binary(max_size=40))
def test_any_bytes_are_one_line(one_place: Path, content: bytes) -> None:
    (one_place / "config.json").write_bytes(content)
    assert isinstance(shape_of(one_place), str)
