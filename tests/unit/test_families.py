"""Every supported family: what transformers writes passes the checks that come before a run."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
from safetensors.torch import load_file, save_file

from gpg_megatron.errors import UserError
from gpg_megatron.layout.hf_io import check_checkpoint
from gpg_megatron.model.hf_keys import FAMILIES
from gpg_megatron.model.shape import load_model_shape
from tests.tiny import Family, make_tiny_model


def test_each_family_has_a_tiny_model(tmp_path: Path) -> None:
    shapes = [load_model_shape(make_tiny_model(tmp_path, family=f)) for f in get_args(Family)]
    assert {shape.architecture for shape in shapes} == FAMILIES.keys()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", get_args(Family))
def test_the_checkpoint_of_a_family(tmp_path: Path, family: Family, tied: bool) -> None:
    """Experts are written one by one, though transformers computes with them as one tensor."""
    directory = make_tiny_model(tmp_path, family=family, tied=tied)
    shape = load_model_shape(directory)
    assert (shape.head_dim, shape.tied) == (32, tied)
    check_checkpoint(directory, shape)


def test_an_expert_that_is_missing_is_named(tmp_path: Path) -> None:
    directory = make_tiny_model(tmp_path, family="qwen3_moe")
    tensors = load_file(directory / "model.safetensors")
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    del tensors[name]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="misses 1 tensors for Qwen3MoeForCausalLM") as caught:
        check_checkpoint(directory, load_model_shape(directory))
    assert name in str(caught.value)
