"""Every supported family: what transformers writes passes the checks that come before a run."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any, get_args

import pytest
from safetensors.torch import load_file, save_file

from gpg_megatron.config.loading import load_config
from gpg_megatron.errors import UserError
from gpg_megatron.layout.hf_io import check_checkpoint
from gpg_megatron.model.families import FAMILIES
from gpg_megatron.model.shape import load_model_shape
from gpg_megatron.start.dry_run import plan_run
from tests.tiny import Family, make_tiny_model

ROOT = Path(__file__).resolve().parents[2]
FAMILY_NAMES = get_args(Family)
SHORT = ("data.max_prompt_length=512", "rollout.max_response_length=512")


def test_each_family_has_a_tiny_model(tmp_path: Path) -> None:
    shapes = [
        load_model_shape(make_tiny_model(tmp_path, family=f, tied=False)) for f in FAMILY_NAMES
    ]
    assert {shape.architecture for shape in shapes} == FAMILIES.keys()


@pytest.mark.parametrize(
    ("family", "tied"),
    [x for x in product(FAMILY_NAMES, (True, False)) if x != ("qwen3_next", True)],
)
def test_the_checkpoint_of_a_family(tmp_path: Path, family: Family, tied: bool) -> None:
    """Experts are written one by one, though transformers computes with them as one tensor."""
    directory = make_tiny_model(tmp_path, family=family, tied=tied)
    shape = load_model_shape(directory)
    assert (shape.head_dim, shape.tied) == (32, tied)
    check_checkpoint(directory, shape)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("mistral", {}),  # with a window
        ("glm4", {}),
        ("qwen3_5_text", {}),
        ("qwen3_5_moe_text", {"num_experts": 32}),
        ("qwen3_next", {"mlp_only_layers": [1], "num_experts": 32}),
        ("qwen2_moe", {"decoder_sparse_step": 2, "mlp_only_layers": [1, 2]}),
    ],
)
def test_the_dry_run_of_a_model_of_the_size_that_transformers_proposes(
    tmp_path: Path, family: str, options: dict[str, Any]
) -> None:
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    config = CONFIG_MAPPING[family](**options)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config.architectures = [type(model).__name__]
    config.save_pretrained(tmp_path)
    layout = ROOT / "configs" / "qwen3-8b_math_megatron.yaml"
    plan = plan_run(load_config(layout, [f"model.path={tmp_path}", *SHORT]), device="cuda")
    assert plan.n_parameters == sum(p.numel() for p in model.parameters()) > 5e9
    assert plan.publish.sent == plan.publish.bound


def test_an_expert_that_is_missing_is_named(tmp_path: Path) -> None:
    directory = make_tiny_model(tmp_path, family="qwen3_moe")
    tensors = load_file(directory / "model.safetensors")
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    del tensors[name]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="misses 1 tensors for Qwen3MoeForCausalLM") as caught:
        check_checkpoint(directory, load_model_shape(directory))
    assert name in str(caught.value)
