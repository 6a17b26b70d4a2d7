"""Rotary angles against transformers' own functions, bit by bit."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpg_megatron.errors import UserError
from gpg_megatron.model.rope import read_rope
from gpg_megatron.model.shape import load_model_shape
from gpg_megatron.policy.rope import inverse_frequencies
from gpg_megatron.shapes import LinearScaling, Llama3Scaling, YarnScaling

LENGTH = 131072
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


def theirs(rope: dict[str, Any], theta: float, head_dim: int) -> tuple[torch.Tensor, float]:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        rope_parameters=rope | {"rope_theta": theta},
    )
    found: tuple[torch.Tensor, float] = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, None)
    return found


FACTORS = st.floats(1.0, 64.0)
ROPES = st.one_of(
    st.fixed_dictionaries({"rope_type": st.just("linear"), "factor": FACTORS}),
    st.fixed_dictionaries(
        {
            "rope_type": st.just("llama3"),
            "factor": FACTORS,
            "low_freq_factor": st.floats(0.5, 2.0),
            "high_freq_factor": st.floats(2.5, 8.0),
            "original_max_position_embeddings": st.integers(512, 16384),
        }
    ),
    st.fixed_dictionaries(
        {
            "rope_type": st.just("yarn"),
            "factor": st.floats(4.0, 64.0),
            "original_max_position_embeddings": st.integers(LENGTH // 4, LENGTH),
        },
        optional={
            "beta_fast": st.floats(8.0, 64.0),
            "beta_slow": st.floats(0.5, 4.0),
            "truncate": st.booleans(),
            "attention_factor": st.floats(0.5, 2.0) | st.none(),
            "mscale": st.floats(0.5, 2.0),
            "mscale_all_dim": st.floats(0.5, 2.0),
        },
    ),
)


@given(ROPES, st.sampled_from([1e4, 5e5, 1e6]), st.sampled_from([32, 64, 80, 128]))
@settings(max_examples=80, deadline=None)
def test_frequencies_are_those_of_transformers(
    rope: dict[str, Any], theta: float, head_dim: int
) -> None:
    read_theta, scaling = read_rope({"rope_parameters": rope, "rope_theta": theta}, LENGTH)
    expected, attention_factor = theirs(dict(rope), theta, head_dim)
    assert read_theta == theta
    assert torch.equal(inverse_frequencies(theta, head_dim, scaling), expected)
    ours = scaling.attention_factor if isinstance(scaling, YarnScaling) else 1.0
    assert ours == pytest.approx(attention_factor, rel=1e-15)


def test_plain_frequencies_by_hand() -> None:
    assert inverse_frequencies(100.0, 4, None).tolist() == pytest.approx([1.0, 0.1])
    halved = inverse_frequencies(100.0, 4, LinearScaling(factor=2.0))
    assert halved.tolist() == pytest.approx([0.5, 0.05])


def test_llama3_by_hand() -> None:
    """Waves of 2 pi and 200 pi tokens, of which the first stays and the second is slowed down."""
    scaling = Llama3Scaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_length=100
    )
    assert inverse_frequencies(1e4, 4, scaling).tolist() == pytest.approx([1.0, 0.01 / 8])
    # 25 to 100 tokens are mixed; a wave of 40 is (100 / 40 - 1) / 3 = half of each.
    theta = (40 / (2 * math.pi)) ** 2
    mixed = inverse_frequencies(theta, 4, scaling)[1].item()
    assert mixed == pytest.approx(2 * math.pi / 40 * (0.5 / 8 + 0.5))


def config(directory: Path, rope: object, **changes: Any) -> Path:
    raw = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 64,
        "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": LENGTH, "rms_norm_eps": 1e-5,
        "rope_theta": 5e5, "rope_scaling": rope, **changes,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(raw))
    return directory


def test_the_kind_is_read_from_either_name(tmp_path: Path) -> None:
    expected = Llama3Scaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_length=8192
    )
    for changes in ({}, {"rope_scaling": None, "rope_parameters": LLAMA3 | {"rope_theta": 5e5}}):
        shape = load_model_shape(config(tmp_path, LLAMA3, **changes), need_weights=False)
        assert (shape.rope_theta, shape.rope_scaling) == (5e5, expected)


def test_the_original_length(tmp_path: Path) -> None:
    """Of the object, and without any the whole length; another one beside it is refused."""
    place = config(tmp_path, {"type": "yarn", "factor": 2})
    scaling = load_model_shape(place, need_weights=False).rope_scaling
    assert isinstance(scaling, YarnScaling) and scaling.original_length == LENGTH
    place = config(tmp_path, YARN, original_max_position_embeddings=32768)
    scaling = load_model_shape(place, need_weights=False).rope_scaling
    assert isinstance(scaling, YarnScaling) and scaling.original_length == 32768
    with pytest.raises(UserError, match="is 65536 in the file and 32768 in its rope_scaling"):
        load_model_shape(
            config(tmp_path, YARN, original_max_position_embeddings=65536), need_weights=False
        )


@pytest.mark.parametrize(
    ("rope", "words"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "rope type dynamic is not supported"),
        ({"rope_type": "longrope"}, "rope type longrope is not supported"),
        ({"rope_type": None}, "rope type null is not supported"),
        ({"rope_type": "linear"}, "rope_scaling has no factor"),
        (
            {"rope_type": "linear", "factor": 2},
            "rope_scaling.factor is 2; expected a number with a point of 1 or more",
        ),
        (LLAMA3 | {"factor": 0.5}, "rope_scaling.factor is 0.5; expected a number of 1 or more"),
        (
            LLAMA3 | {"low_freq_factor": "1"},
            'rope_scaling.low_freq_factor is "1"; expected a number above 0',
        ),
        (
            LLAMA3 | {"high_freq_factor": 1.0},
            "rope_scaling.low_freq_factor 1 is not below high_freq_factor 1",
        ),
        (YARN | {"factor": None}, "rope_scaling.factor is null; expected a number of 1 or more"),
        (
            YARN | {"factor": 2.0},
            "rope_scaling: factor 2 times original_max_position_embeddings 32768 is less than "
            "max_position_embeddings 131072, and the engine goes no further",
        ),
        (YARN | {"beta_fast": 0.5}, "rope_scaling.beta_fast is below beta_slow"),
        (YARN | {"truncate": 1}, "rope_scaling.truncate is 1; expected true or false"),
        (
            YARN | {"attention_factor": -1.0},
            "rope_scaling.attention_factor is -1.0; expected a number above 0 or null",
        ),
        (YARN | {"rope_theta": 1}, "rope_theta is 1; expected a number above 1 for yarn"),
        (
            LLAMA3 | {"partial_rotary_factor": 0.5},
            "rope_scaling.partial_rotary_factor other than 1 is not supported",
        ),
    ],
)
def test_what_cannot_be_meant_is_said(tmp_path: Path, rope: Any, words: str) -> None:
    with pytest.raises(UserError) as caught:
        load_model_shape(config(tmp_path, rope), need_weights=False)
    assert str(caught.value) == f"{tmp_path / 'config.json'}: {words}"
