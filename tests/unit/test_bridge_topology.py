"""Which rank holds what: against Megatron's own rank groups, and element by element.

"Held once" counts boxes and not ranks: ranks that hold the same rectangle stand in one group.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from gpg_megatron.config.sections import PolicyConfig
from gpg_megatron.layout.boxes import Box, Shard
from gpg_megatron.layout.families import pieces_of
from gpg_megatron.layout.topology import (
    PolicyGrid,
    check_shards,
    held_by_policy,
    hf_shapes,
    local_shapes,
)
from gpg_megatron.model.pipeline import pipeline_stages
from gpg_megatron.shapes import (
    DeltaShape,
    GroupRouting,
    LatentShape,
    ModelShape,
    MoEShape,
)

LAYERS = 5
DENSE = ModelShape(
    architecture="LlamaForCausalLM",
    num_layers=LAYERS,
    hidden_size=24,
    ffn_size=40,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    vocab_size=150,
    tied=False,
    qkv_bias=False,
    qk_norm=False,
    rope_theta=1e4,
    rms_norm_eps=1e-6,
    max_position_embeddings=64,
)
EXPERTS = MoEShape(
    num_experts=4, experts_per_token=2, ffn_size=12, shared_ffn_size=0, renormalised=True
)
NETS = DeltaShape(
    layers=(0, 1, 3), key_heads=4, value_heads=8, key_dim=3, value_dim=5, kernel=4, fused=False
)
MODELS = {
    "untied": DENSE,
    "tied": replace(DENSE, tied=True),
    "biases": replace(DENSE, architecture="Qwen2ForCausalLM", qkv_bias=True),
    "qk_norm": replace(DENSE, architecture="Qwen3ForCausalLM", qk_norm=True, tied=True),
    "experts": replace(DENSE, architecture="Qwen3MoeForCausalLM", qk_norm=True, moe=EXPERTS),
    "shared_expert": replace(
        DENSE,
        architecture="Qwen2MoeForCausalLM",
        qkv_bias=True,
        moe=replace(EXPERTS, shared_ffn_size=20),
    ),
    "some_experts": replace(
        DENSE,
        architecture="Qwen3MoeForCausalLM",
        qk_norm=True,
        moe=replace(EXPERTS, dense_layers=(1, 4)),
    ),
    "sigmoid": replace(
        DENSE,
        architecture="Glm4MoeForCausalLM",
        qkv_bias=True,
        qk_norm=True,
        moe=replace(
            EXPERTS,
            shared_ffn_size=24,
            dense_layers=(0, 1),
            routing=GroupRouting(has_bias=True, n_groups=1, chosen_groups=1, scale=1.0),
        ),
    ),
    "latent": replace(
        DENSE,
        architecture="DeepseekV3ForCausalLM",
        num_kv_heads=4,
        rotary_dim=4,
        latent=LatentShape(q_rank=20, kv_rank=12, rope_dim=4, value_dim=6, score_scale=1.0),
        moe=replace(
            EXPERTS,
            shared_ffn_size=12,
            dense_layers=(0,),
            routing=GroupRouting(has_bias=True, n_groups=1, chosen_groups=1, scale=1.0),
        ),
    ),
    "latent_softmax": replace(
        DENSE,
        architecture="DeepseekV2ForCausalLM",
        num_kv_heads=4,
        rotary_dim=4,
        latent=LatentShape(q_rank=0, kv_rank=12, rope_dim=4, value_dim=6, score_scale=1.0),
        moe=replace(
            EXPERTS,
            shared_ffn_size=12,
            routing=GroupRouting(has_bias=False, n_groups=2, chosen_groups=1, scale=1.0),
        ),
    ),
    "all_biases": replace(DENSE, qkv_bias=True, output_bias=True, mlp_bias=True),
    "post_norms": replace(
        DENSE, architecture="Glm4ForCausalLM", qkv_bias=True, post_norms=True, fused_gate_up=True
    ),
    "delta": replace(
        DENSE, architecture="Qwen3_5ForCausalLM", qk_norm=True, output_gate=True, delta=NETS
    ),
    "delta_experts": replace(
        DENSE,
        architecture="Qwen3NextForCausalLM",
        qk_norm=True,
        output_gate=True,
        delta=replace(NETS, fused=True),
        moe=replace(EXPERTS, shared_ffn_size=20, dense_layers=(2,)),
    ),
}


def make_grid(
    *,
    tp: int = 1,
    pp: int = 1,
    dp: int = 1,
    ep: int = 1,
    first: int | None = None,
    last: int | None = None,
    virtual: int = 1,
    transformer_engine: bool = False,
) -> PolicyGrid:
    policy = PolicyConfig(
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=virtual,
        num_layers_in_first_pipeline_stage=first,
        num_layers_in_last_pipeline_stage=last,
    )
    return PolicyGrid(
        tp_size=tp,
        dp_size=dp,
        pp_size=pp,
        ep_size=ep,
        stage_of_layer=pipeline_stages(policy, LAYERS),
        transformer_engine=transformer_engine,
    )


GRIDS = {
    "single": make_grid(),
    "tp2": make_grid(tp=2),
    "tp4": make_grid(tp=4),  # more than key-value heads
    "dp3": make_grid(dp=3),
    "pp5": make_grid(pp=5),
    "tp2_pp2_dp2": make_grid(tp=2, pp=2, dp=2, first=2),
    "uneven": make_grid(tp=2, pp=3, first=1, last=1),
    "interleaved": make_grid(tp=2, pp=2, virtual=2),
    "ep2_dp4": make_grid(tp=2, dp=4, ep=2),
    "ep4_pp2_dp4": make_grid(pp=2, dp=4, ep=4, last=1),
    "te_ep2": make_grid(tp=2, dp=2, ep=2, transformer_engine=True),
}


# ---- ranks ------------------------------------------------------------------------------


def test_ranks_by_hand() -> None:
    """TP2, DP4 with EP2, PP2: 16 ranks; stage 1 begins at rank 8."""
    grid = make_grid(tp=2, pp=2, dp=4, ep=2, last=2)
    assert grid.world_size == 16
    assert [grid.rank(tp=t, dp=0, pp=0) for t in range(2)] == [0, 1]
    assert [grid.rank(tp=1, dp=d, pp=0) for d in range(4)] == [1, 3, 5, 7]
    assert grid.rank(tp=1, dp=2, pp=1) == 13
    assert grid.holders(0, 0, None) == (0, 2, 4, 6)
    assert grid.holders(1, None, None) == tuple(range(8, 16))
    assert grid.holders(0, 1, 0) == (1, 5)
    assert grid.holders(1, 0, 1) == (10, 14)
    assert grid.holders(1, 0, 1) is grid.holders(1, 0, 1)


@pytest.mark.parametrize(
    ("tp", "pp", "dp", "ep"),
    [(1, 1, 1, 1), (2, 1, 4, 4), (2, 2, 4, 2), (1, 5, 6, 3), (4, 3, 8, 2), (8, 2, 16, 16)],
)
def test_ranks_are_those_of_megatron(tp: int, pp: int, dp: int, ep: int) -> None:
    from megatron.core.parallel_state import RankGenerator

    grid = PolicyGrid(tp_size=tp, dp_size=dp, pp_size=pp, ep_size=ep, stage_of_layer=())
    order = "tp-cp-ep-dp-pp"
    dense = RankGenerator(tp=tp, ep=1, dp=dp, pp=pp, cp=1, order=order)
    expert = RankGenerator(tp=tp, ep=ep, dp=dp // ep, pp=pp, cp=1, order=order)
    assert dense.world_size == expert.world_size == grid.world_size
    stages, positions = range(pp), range(tp)

    def groups(generator: RankGenerator, kind: str) -> list[tuple[int, ...]]:
        return sorted(tuple(group) for group in generator.get_ranks(kind))

    assert groups(dense, "tp") == sorted(
        tuple(grid.rank(tp=t, dp=d, pp=p) for t in positions) for p in stages for d in range(dp)
    )
    assert groups(dense, "pp") == sorted(
        tuple(grid.rank(tp=t, dp=d, pp=p) for p in stages) for d in range(dp) for t in positions
    )
    assert groups(dense, "dp") == sorted(
        grid.holders(p, t, None) for p in stages for t in positions
    )
    assert groups(dense, "tp-dp") == sorted(grid.holders(p, None, None) for p in stages)
    # A rank's place in its expert-parallel group is the number of its run of experts.
    for group in expert.get_ranks("ep"):
        for e, rank in enumerate(group):
            stage, t = rank // (tp * dp), rank % tp
            assert rank in grid.holders(stage, t, e)
    assert groups(expert, "dp") == sorted(
        grid.holders(p, t, e) for p in stages for t in positions for e in range(ep)
    )


# ---- what is held -----------------------------------------------------------------------


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_every_element_is_held_by_one_group_of_ranks(model: ModelShape, grid: PolicyGrid) -> None:
    held = held_by_policy(model, grid)
    shapes = hf_shapes(model)
    assert held.keys() == shapes.keys()
    for name, rectangles in held.items():
        count = np.zeros(shapes[name], int)
        for box in {rectangle.hf for rectangle in rectangles}:
            assert Box.whole(count.shape).intersect(box) == box
            count[box.slices] += 1
        assert (count == 1).all(), name


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_every_piece_of_every_rank_is_held_and_nothing_else(
    model: ModelShape, grid: PolicyGrid
) -> None:
    pieces: Counter[tuple[object, ...]] = Counter()
    for rank in range(grid.world_size):
        for name, shape in local_shapes(model, grid, rank).items():
            shard = Shard(shape, rank % grid.tp_size, grid.tp_size)
            for piece in pieces_of(name, shard, model):
                assert Box.whole(shape).intersect(piece.local) == piece.local
                pieces[rank, piece.hf_name, piece.hf, name, piece.local] += 1
    held = Counter(
        (rank, name, rectangle.hf, rectangle.parameter, rectangle.local)
        for name, rectangles in held_by_policy(model, grid).items()
        for rectangle in rectangles
        for rank in rectangle.ranks
    )
    assert held == pieces
    assert set(pieces.values()) == {1}


def test_a_tied_embedding_is_on_both_ends_of_the_pipeline() -> None:
    model = MODELS["tied"]
    (alone,) = held_by_policy(model, make_grid(dp=2))["model.embed_tokens.weight"]
    assert (alone.parameter, alone.ranks) == ("embedding.word_embeddings.weight", (0, 1))
    first, last = held_by_policy(model, make_grid(pp=5))["model.embed_tokens.weight"]
    assert first.hf == last.hf
    assert (first.parameter, first.ranks) == ("embedding.word_embeddings.weight", (0,))
    assert (last.parameter, last.ranks) == ("output_layer.weight", (4,))


def test_where_experts_and_norms_are() -> None:
    """TP2, DP4 with EP2: experts 0 and 1 on the even copies, 2 and 3 on the odd ones."""
    held = held_by_policy(MODELS["experts"], GRIDS["ep2_dp4"])
    ranks = {
        expert: [h.ranks for h in held[f"model.layers.3.mlp.experts.{expert}.down_proj.weight"]]
        for expert in range(4)
    }
    assert ranks == {
        0: [(0, 4), (1, 5)],
        1: [(0, 4), (1, 5)],
        2: [(2, 6), (3, 7)],
        3: [(2, 6), (3, 7)],
    }
    (router,) = held["model.layers.3.mlp.gate.weight"]
    assert router.ranks == tuple(range(8))


def test_local_shapes_by_hand() -> None:
    """The last of two stages of a TP2 Qwen3-MoE with EP2; 150 words are padded to 2 * 128."""
    model = replace(MODELS["experts"], num_layers=2)
    grid = PolicyGrid(tp_size=2, dp_size=2, pp_size=2, ep_size=2, stage_of_layer=(0, 1))
    expected = {
        "input_layernorm.weight": (24,),
        "self_attention.linear_qkv.weight": (32, 24),
        "self_attention.q_layernorm.weight": (8,),
        "self_attention.k_layernorm.weight": (8,),
        "self_attention.linear_proj.weight": (24, 16),
        "pre_mlp_layernorm.weight": (24,),
        "mlp.router.weight": (4, 24),
        "mlp.experts.local_experts.2.linear_fc1.weight": (12, 24),
        "mlp.experts.local_experts.2.linear_fc2.weight": (24, 6),
        "mlp.experts.local_experts.3.linear_fc1.weight": (12, 24),
        "mlp.experts.local_experts.3.linear_fc2.weight": (24, 6),
    }
    assert local_shapes(model, grid, grid.rank(tp=0, dp=1, pp=1)) == {
        "decoder.final_layernorm.weight": (24,),
        "output_layer.weight": (128, 24),
        **{f"decoder.layers.1.{name}": shape for name, shape in expected.items()},
    }


def test_names_of_transformer_engine() -> None:
    grid = GRIDS["te_ep2"]
    dense = local_shapes(DENSE, grid, 0)
    assert "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight" in dense
    assert "decoder.layers.0.mlp.linear_fc1.layer_norm_weight" in dense
    nets = local_shapes(MODELS["delta"], grid, 0)
    norms = {
        name for name in nets if name.endswith(("input_layernorm.weight", "qkv.layer_norm_weight"))
    }
    assert norms == {f"decoder.layers.{i}.input_layernorm.weight" for i in (0, 1, 3)} | {
        f"decoder.layers.{i}.self_attention.linear_qkv.layer_norm_weight" for i in (2, 4)
    }
    experts = local_shapes(MODELS["experts"], grid, grid.rank(tp=0, dp=1, pp=0))
    names = {name for name in experts if ".layers.4.mlp." in name}
    assert names == {"decoder.layers.4.mlp.router.weight"} | {
        f"decoder.layers.4.mlp.experts.linear_{fc}.weight{e}"
        for fc in ("fc1", "fc2")
        for e in (2, 3)
    }


# ---- Hugging Face files -----------------------------------------------------------------


def written_by_transformers(model: ModelShape, directory: Path) -> Mapping[str, tuple[int, ...]]:
    """The tensors of a tiny model's file."""
    import transformers

    family = model.architecture.removesuffix("ForCausalLM")
    options: dict[str, Any] = {"pad_token_id": None}
    if family in ("Llama", "Glm4", "Glm4Moe"):
        options["attention_bias"], options["mlp_bias"] = model.qkv_bias, model.mlp_bias
    if model.latent:
        options |= {
            "q_lora_rank": model.latent.q_rank or None,
            "kv_lora_rank": model.latent.kv_rank,
            "qk_rope_head_dim": model.latent.rope_dim,
            "qk_nope_head_dim": model.head_dim - model.latent.rope_dim,
            "v_head_dim": model.latent.value_dim,
        }
    if model.moe:
        options |= {
            "num_experts": model.moe.num_experts,
            "moe_intermediate_size": model.moe.ffn_size,
            "decoder_sparse_step": 1,
            "mlp_only_layers": list(model.moe.dense_layers),
        }
        if model.moe.routing:
            options |= {
                "n_routed_experts": options.pop("num_experts"),
                "n_shared_experts": model.moe.shared_ffn_size // model.moe.ffn_size,
                "first_k_dense_replace": len(model.moe.dense_layers),
                "use_qk_norm": model.qk_norm,
            }
        elif model.moe.shared_ffn_size:
            options["shared_expert_intermediate_size"] = model.moe.shared_ffn_size
    if delta := model.delta:
        types = ["full_attention", "linear_attention"]
        options |= {
            "layer_types": [types[i in delta.layers] for i in range(model.num_layers)],
            "linear_num_key_heads": delta.key_heads,
            "linear_num_value_heads": delta.value_heads,
            "linear_key_head_dim": delta.key_dim,
            "linear_value_head_dim": delta.value_dim,
        }
    name = f"{family}TextConfig"
    config = getattr(transformers, name, getattr(transformers, f"{family}Config"))(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.ffn_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
        num_key_value_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        tie_word_embeddings=model.tied,
        **options,
    )
    getattr(transformers, model.architecture)(config).save_pretrained(directory)
    with safe_open(directory / "model.safetensors", framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", [kind for kind in MODELS if kind != "tied"])
def test_hf_shapes_are_those_of_transformers(tmp_path: Path, kind: str, tied: bool) -> None:
    model = replace(MODELS[kind], tied=tied)
    assert hf_shapes(model) == written_by_transformers(model, tmp_path)


# ---- check_shards -----------------------------------------------------------------------

QKV = "decoder.layers.0.self_attention.linear_qkv.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({QKV: (31, 24)}, f"parameter {QKV} has shape (31, 24), and the table of "
                          "LlamaForCausalLM expects (32, 24)"),
        ({QKV: None}, f"parameter {QKV} has shape None, and the table of "
                      "LlamaForCausalLM expects (32, 24)"),
        ({"extra.bias": (3,)}, "parameter extra.bias has shape (3,), and the table of "
                               "LlamaForCausalLM expects None"),
    ],
    ids=["shape", "missing", "unknown"],
)  # fmt: skip
def test_check_shards_names_the_parameter(
    change: dict[str, tuple[int, ...] | None], message: str
) -> None:
    grid = GRIDS["tp2"]
    shards = local_shapes(DENSE, grid, 1)
    check_shards(shards, DENSE, grid, 1)
    changed = {name: shape for name, shape in (shards | change).items() if shape is not None}
    with pytest.raises(ValueError, match=f"^policy rank 1: {re.escape(message)}$"):
        check_shards(changed, DENSE, grid, 1)


def test_check_shards_knows_the_experts_of_a_rank() -> None:
    """A rank with its neighbour's experts is refused."""
    model, grid = MODELS["experts"], GRIDS["ep2_dp4"]
    neighbour = local_shapes(model, grid, grid.rank(tp=0, dp=1, pp=0))
    check_shards(neighbour, model, grid, grid.rank(tp=0, dp=3, pp=0))
    with pytest.raises(ValueError, match=r"^policy rank 0: parameter .*local_experts\.[0-3]\."):
        check_shards(neighbour, model, grid, 0)
