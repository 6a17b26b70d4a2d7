"""Operations of training, against parameters counted by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gpg_megatron.host.peak import bf16_peak, peak_flops_per_s
from gpg_megatron.model.flops import TokenCosts, token_costs
from gpg_megatron.shapes import DeltaShape, ModelShape, MoEShape


def shape(moe: MoEShape | None = None) -> ModelShape:
    return ModelShape(
        architecture="LlamaForCausalLM",
        num_layers=30,
        hidden_size=576,
        ffn_size=1536,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        vocab_size=49152,
        tied=True,
        qkv_bias=False,
        qk_norm=False,
        rope_theta=1e4,
        rms_norm_eps=1e-5,
        max_position_embeddings=8192,
        moe=moe,
    )


def test_a_dense_model() -> None:
    costs = token_costs(shape())
    # SmolLM2-135M: 134,515,008 parameters, of which the norms (61 * 576) multiply nothing
    matrices = 134_515_008 - 61 * 576 - 49152 * 576
    assert costs.per_token == 6 * matrices
    assert costs.per_loss_token == 6 * 49152 * 576
    # scores and their sum of values: 9 heads of 64, two products
    assert costs.per_pair == 6 * 30 * 2 * 9 * 64


def test_a_token_pays_for_the_experts_that_it_visits() -> None:
    moe = MoEShape(
        num_experts=60, experts_per_token=4, ffn_size=100, shared_ffn_size=200, renormalised=False
    )
    per_layer = (token_costs(shape(moe)).per_token - token_costs(shape()).per_token) / (6 * 30)
    assert per_layer == 576 * (3 * 600 + 60) - 576 * 3 * 1536
    some = token_costs(shape(replace(moe, dense_layers=(0, 7, 8)))).per_token
    assert token_costs(shape(moe)).per_token - some == 6 * 3 * per_layer


def test_gated_delta_nets_and_a_gate_of_attention() -> None:
    nets = DeltaShape(
        layers=(0, 1, 3), key_heads=4, value_heads=8, key_dim=16, value_dim=32, kernel=4,
        fused=False,
    )  # fmt: skip
    plain, found = (token_costs(replace(shape(), delta=x, output_gate=True)) for x in (None, nets))
    gates = (plain.per_token - token_costs(shape()).per_token) / 6
    assert gates == 30 * 576 * 576
    assert found.per_pair == 27 / 30 * plain.per_pair
    attention = 576 * (3 * 9 + 2 * 3) * 64
    # 64 elements of all queries and of all keys, 256 of all values
    net = 576 * (64 + 64 + 256 + 256 + 8 + 8) + 256 * 576 + 4 * (64 + 64 + 256) + 3 * 8 * 16 * 32
    assert plain.per_token - found.per_token == 6 * 3 * (attention - net)


@given(st.integers(0, 9), st.integers(0, 9), st.none() | st.integers(1, 12))
def test_pairs_one_by_one(before: int, own: int, window: int | None) -> None:
    costs = TokenCosts(per_token=0.0, per_loss_token=0.0, per_pair=1.0, window=window)
    seen = [min(position + 1, window or 99) for position in range(before, before + own)]
    assert costs.pairs(before, own) == sum(seen)


def test_total() -> None:
    costs = TokenCosts(per_token=100.0, per_loss_token=10.0, per_pair=1.0)
    assert costs.total(n_tokens=2, n_loss_tokens=3, n_pairs=4) == 234.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_peak_is_what_a_product_reaches(dtype: torch.dtype) -> None:
    """Between a slow core and more than any CPU does."""
    assert 1e8 < peak_flops_per_s("cpu", dtype) < 1e15


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H20", 148e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GeForce RTX 3090", None),
    ],
)
def test_the_peak_of_a_gpu_by_its_name(name: str, peak: float | None) -> None:
    assert bf16_peak(name) == peak
