"""Checkpoints on disk -> shards of every rank -> put together again the way Megatron defines."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from gpg_megatron.errors import UserError
from gpg_megatron.layout.hf_io import check_checkpoint, index_of, load_hf
from gpg_megatron.shapes import ModelShape
from gpg_megatron.types import ParallelPosition

LAYERS, HIDDEN, FFN, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 4, 6, 8, 4, 2, 4, 300
GROUP = HEADS // KV_HEADS
# Rows on each rank, by tensor-parallel size. With 4 ranks the last one holds padding only.
VOCAB_ROWS = {1: 384, 2: 256, 4: 128}

UNTIED = ModelShape(
    architecture="Qwen2ForCausalLM",
    num_layers=LAYERS,
    hidden_size=HIDDEN,
    ffn_size=FFN,
    num_heads=HEADS,
    num_kv_heads=KV_HEADS,
    head_dim=HEAD_DIM,
    vocab_size=VOCAB,
    tied=False,
    qkv_bias=True,
    qk_norm=True,
    rope_theta=1e4,
    rms_norm_eps=1e-6,
    max_position_embeddings=64,
)
"""Every kind of parameter at once."""
TIED = dataclasses.replace(UNTIED, tied=True)

COLUMNS = {
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
}
COPIES = {
    "input_layernorm.weight": "input_layernorm.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
    "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
}

Tensors = dict[str, torch.Tensor]
Stage = dict[str, list[torch.Tensor]]
"""Parameter of a pipeline stage -> its shards by tensor-parallel rank."""


def checkpoint(model: ModelShape = UNTIED, dtype: torch.dtype = torch.float32) -> Tensors:
    """Random tensors under the names and with the shapes of a Hugging Face model."""
    layer = {
        "input_layernorm.weight": (HIDDEN,),
        "post_attention_layernorm.weight": (HIDDEN,),
        "self_attn.q_proj.weight": (HEADS * HEAD_DIM, HIDDEN),
        "self_attn.k_proj.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
        "self_attn.v_proj.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
        "self_attn.q_proj.bias": (HEADS * HEAD_DIM,),
        "self_attn.k_proj.bias": (KV_HEADS * HEAD_DIM,),
        "self_attn.v_proj.bias": (KV_HEADS * HEAD_DIM,),
        "self_attn.q_norm.weight": (HEAD_DIM,),
        "self_attn.k_norm.weight": (HEAD_DIM,),
        "self_attn.o_proj.weight": (HIDDEN, HEADS * HEAD_DIM),
        "mlp.gate_proj.weight": (FFN, HIDDEN),
        "mlp.up_proj.weight": (FFN, HIDDEN),
        "mlp.down_proj.weight": (HIDDEN, FFN),
    }
    shapes = {f"model.layers.{n}.{name}": s for n in range(LAYERS) for name, s in layer.items()}
    shapes |= {"model.embed_tokens.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,)}
    if not model.tied:
        shapes["lm_head.weight"] = (VOCAB, HIDDEN)
    generator = torch.Generator().manual_seed(0)
    return {n: torch.randn(s, generator=generator).to(dtype) for n, s in shapes.items()}


def save(directory: Path, tensors: Tensors, *, files: int = 1, index: bool = False) -> Path:
    """Spread the tensors over files in turn."""
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for number in range(files):
        part = {name: tensors[name].contiguous() for name in names[number::files]}
        file = f"model-{number + 1:05}-of-{files:05}.safetensors"
        save_file(part, directory / file)
        weight_map |= dict.fromkeys(part, file)
    if index:
        text = json.dumps({"metadata": {}, "weight_map": weight_map})
        (directory / "model.safetensors.index.json").write_text(text)
    return directory


def position(tp_rank: int, tp: int, pp_rank: int, pp: int) -> ParallelPosition:
    return ParallelPosition(
        rank=pp_rank * tp + tp_rank,
        tp_rank=tp_rank,
        tp_size=tp,
        dp_rank=0,
        dp_size=1,
    )


def empty_shards(
    model: ModelShape, tp: int, pp_rank: int, pp: int, dtype: torch.dtype = torch.float32
) -> Tensors:
    """What Policy.named_shards gives on a rank, full of nan."""
    layer = {
        "input_layernorm.weight": (HIDDEN,),
        "self_attention.linear_qkv.weight": ((HEADS + 2 * KV_HEADS) * HEAD_DIM // tp, HIDDEN),
        "self_attention.linear_qkv.bias": ((HEADS + 2 * KV_HEADS) * HEAD_DIM // tp,),
        "self_attention.q_layernorm.weight": (HEAD_DIM,),
        "self_attention.k_layernorm.weight": (HEAD_DIM,),
        "self_attention.linear_proj.weight": (HIDDEN, HEADS * HEAD_DIM // tp),
        "pre_mlp_layernorm.weight": (HIDDEN,),
        "mlp.linear_fc1.weight": (2 * FFN // tp, HIDDEN),
        "mlp.linear_fc2.weight": (HIDDEN, FFN // tp),
    }
    per_stage = LAYERS // pp
    shapes = {
        f"decoder.layers.{n}.{name}": shape
        for n in range(pp_rank * per_stage, (pp_rank + 1) * per_stage)
        for name, shape in layer.items()
    }
    first, last = pp_rank == 0, pp_rank == pp - 1
    vocab = (VOCAB_ROWS[tp], HIDDEN)
    if first:
        shapes["embedding.word_embeddings.weight"] = vocab
    if last:
        shapes["decoder.final_layernorm.weight"] = (HIDDEN,)
    if last and not (model.tied and first):
        shapes["output_layer.weight"] = vocab
    return {name: torch.full(shape, torch.nan, dtype=dtype) for name, shape in shapes.items()}


def load(directory: Path, model: ModelShape, tp: int = 1, pp: int = 1) -> list[Stage]:
    """What all ranks hold after loading."""
    stages = []
    for pp_rank in range(pp):
        ranks = [empty_shards(model, tp, pp_rank, pp) for _ in range(tp)]
        for tp_rank, shards in enumerate(ranks):
            load_hf(directory, shards, model, position(tp_rank, tp, pp_rank, pp))
        stages.append({name: [shards[name] for shards in ranks] for name in ranks[0]})
    return stages


def same_on_all(shards: list[torch.Tensor]) -> torch.Tensor:
    for other in shards[1:]:
        assert torch.equal(other, shards[0])
    return shards[0]


def split_qkv(shards: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Raw rows -> groups of query heads, a key, a value."""
    fused = torch.cat(shards)
    tail = fused.shape[1:]
    heads = fused.view(KV_HEADS, GROUP + 2, HEAD_DIM, *tail)
    q, k, v = heads.split([GROUP, 1, 1], dim=1)
    return tuple(x.reshape(-1, *tail) for x in (q, k, v))


def without_padding(shards: list[torch.Tensor]) -> torch.Tensor:
    full = torch.cat(shards)
    assert not full[VOCAB:].any(), "padding rows are zero"
    return full[:VOCAB]


def gathered(stages: list[Stage]) -> Tensors:
    """The Hugging Face tensors that all ranks hold; output_layer stays under its own name."""
    result: Tensors = {}
    for stage in stages:
        layers = {name.split(".")[2] for name in stage if name.startswith("decoder.layers.")}
        for n in layers:
            ours, theirs = f"decoder.layers.{n}.", f"model.layers.{n}."
            for kind in ("weight", "bias"):
                qkv = split_qkv(stage[f"{ours}self_attention.linear_qkv.{kind}"])
                for x, tensor in zip("qkv", qkv, strict=True):
                    result[f"{theirs}self_attn.{x}_proj.{kind}"] = tensor
            halves = [shard.chunk(2) for shard in stage[f"{ours}mlp.linear_fc1.weight"]]
            for x, parts in zip(("gate", "up"), zip(*halves, strict=True), strict=True):
                result[f"{theirs}mlp.{x}_proj.weight"] = torch.cat(parts)
            for name, hf in COLUMNS.items():
                result[theirs + hf] = torch.cat(stage[ours + name], dim=1)
            for name, hf in COPIES.items():
                result[theirs + hf] = same_on_all(stage[ours + name])
        if "embedding.word_embeddings.weight" in stage:
            embedding = without_padding(stage["embedding.word_embeddings.weight"])
            result["model.embed_tokens.weight"] = embedding
        if "decoder.final_layernorm.weight" in stage:
            result["model.norm.weight"] = same_on_all(stage["decoder.final_layernorm.weight"])
        if "output_layer.weight" in stage:
            result["output_layer"] = without_padding(stage["output_layer.weight"])
    return result


def assert_same(actual: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (4, 1), (1, 2), (2, 4), (4, 2)])
def test_every_rank_gets_its_part(tmp_path: Path, tp: Any, pp: Any) -> None:
    tensors = checkpoint()
    actual = gathered(load(save(tmp_path, tensors), UNTIED, tp, pp))
    assert_same(actual, {"output_layer": tensors.pop("lm_head.weight"), **tensors})


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2), (4, 2)])
def test_a_tied_model(tmp_path: Path, tp: Any, pp: Any) -> None:
    """The last of several stages has a copy of the embedding; an extra lm_head is not read."""
    tensors = checkpoint(TIED)
    stray = {"lm_head.weight": torch.full((VOCAB, HIDDEN), 9.0)}
    directory = save(tmp_path, tensors | stray)
    check_checkpoint(directory, TIED)
    actual = gathered(load(directory, TIED, tp, pp))
    if pp > 1:
        assert torch.equal(actual.pop("output_layer"), tensors["model.embed_tokens.weight"])
    assert_same(actual, tensors)


@pytest.mark.parametrize(("files", "index"), [(1, True), (3, True), (3, False)])
def test_several_files(tmp_path: Path, files: Any, index: Any) -> None:
    tensors = checkpoint()
    directory = save(tmp_path, tensors, files=files, index=index)
    check_checkpoint(directory, UNTIED)
    actual = gathered(load(directory, UNTIED, tp=2))
    assert_same(actual, {"output_layer": tensors.pop("lm_head.weight"), **tensors})


def test_files_that_the_index_does_not_name_are_not_read(tmp_path: Path) -> None:
    save(tmp_path, checkpoint(), files=2, index=True)
    save_file({"other.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    check_checkpoint(tmp_path, UNTIED)
    second = tmp_path / "model-00002-of-00002.safetensors"
    assert index_of(tmp_path)[list(checkpoint())[1]] == second


def test_the_shards_keep_their_own_type(tmp_path: Path) -> None:
    """fp32 files into bf16 shards: each element is rounded."""
    tensors = checkpoint()
    shards = empty_shards(UNTIED, 1, 0, 1, torch.bfloat16)
    load_hf(save(tmp_path, tensors), shards, UNTIED, position(0, 1, 0, 1))
    norm = shards["decoder.final_layernorm.weight"]
    assert norm.dtype == torch.bfloat16
    assert torch.equal(norm, tensors["model.norm.weight"].bfloat16())


def test_a_bf16_file_fills_fp32_shards_exactly(tmp_path: Path) -> None:
    tensors = checkpoint(dtype=torch.bfloat16)
    actual = gathered(load(save(tmp_path, tensors), UNTIED))
    expected = {name: tensor.float() for name, tensor in tensors.items()}
    assert_same(actual, {"output_layer": expected.pop("lm_head.weight"), **expected})


WRONG_SHAPES = [
    ("model.embed_tokens.weight", (VOCAB - 1, HIDDEN)),
    ("model.embed_tokens.weight", (VOCAB + 1, HIDDEN)),
    ("model.norm.weight", (HIDDEN + 1,)),
    ("model.norm.weight", (1, HIDDEN)),
    ("model.layers.1.mlp.up_proj.weight", (FFN - 1, HIDDEN)),
    ("model.layers.1.mlp.up_proj.weight", (2 * FFN, HIDDEN)),
    ("model.layers.1.mlp.down_proj.weight", (HIDDEN, FFN // 2)),
    ("model.layers.1.mlp.down_proj.weight", (HIDDEN, 2 * FFN)),
    ("model.layers.3.self_attn.k_proj.weight", (HEAD_DIM, HIDDEN)),
    ("model.layers.3.self_attn.q_proj.bias", (HEADS * HEAD_DIM, 1)),
]


@pytest.mark.parametrize(("name", "shape"), WRONG_SHAPES)
def test_another_shape_than_config_json_says(tmp_path: Path, name: Any, shape: Any) -> None:
    """The message says which tensor of which file."""
    directory = save(tmp_path, checkpoint() | {name: torch.zeros(shape)}, files=2)
    message = refusal(directory, UNTIED)
    assert name in message
    assert str(index_of(directory)[name]) in message
    assert str(list(shape)) in message


def refusal(directory: Path, model: ModelShape) -> str:
    with pytest.raises(UserError) as caught:
        check_checkpoint(directory, model)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("index", [True, False])
def test_missing_tensors(tmp_path: Path, index: Any) -> None:
    tensors = checkpoint()
    gone = sorted(name for name in tensors if "k_proj" in name)
    for name in gone:
        del tensors[name]
    message = refusal(save(tmp_path, tensors, index=index), UNTIED)
    assert f"misses {len(gone)} tensors" in message and str(tmp_path) in message
    assert [name in message for name in gone] == [True] * 3 + [False] * (len(gone) - 3)


def test_unknown_tensors(tmp_path: Path) -> None:
    extra = {f"model.layers.{LAYERS}.mlp.up_proj.weight": torch.zeros(1)}
    message = refusal(save(tmp_path, checkpoint() | extra), UNTIED)
    assert "has unknown 1 tensors" in message and next(iter(extra)) in message


def test_a_tied_checkpoint_for_an_untied_config(tmp_path: Path) -> None:
    message = refusal(save(tmp_path, checkpoint(TIED)), UNTIED)
    assert "misses 1 tensors" in message and "lm_head.weight" in message


def test_a_tied_model_needs_the_matrix_under_the_name_of_the_embedding(tmp_path: Path) -> None:
    tensors = checkpoint(TIED)
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    assert "model.embed_tokens.weight" in refusal(save(tmp_path, tensors), TIED)


def test_an_index_that_names_a_missing_file(tmp_path: Path) -> None:
    """An interrupted download."""
    save(tmp_path, checkpoint(), files=3, index=True)
    file = tmp_path / "model-00002-of-00003.safetensors"
    file.unlink()
    assert file.name in refusal(tmp_path, UNTIED)


def test_a_truncated_file(tmp_path: Path) -> None:
    save(tmp_path, checkpoint())
    (file,) = tmp_path.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-100])
    assert file.name in refusal(tmp_path, UNTIED)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", ":1: Expecting property name"),
        ("{}", ": expected a JSON object with a weight_map"),
        ("[]", ": expected a JSON object"),
        ('{"weight_map": ["a"]}', ": expected a JSON object with a weight_map"),
        ('{"weight_map": {"a": 3}}', ": a is in 3; expected a *.safetensors"),
        ('{"weight_map": {"a": "b.bin"}}', ': a is in "b.bin"; expected a *.safetensors'),
        ('{"weight_map": {"a": "b\\u0000.safetensors"}}', ": a is in "),
        ("version https://git-lfs.github.com/spec/v1", ": a git-lfs pointer"),
        ("[" * 100_000, ": nested too deeply"),
        ('{"weight_map": {"a": "\\ud800.safetensors"}}', ": a lone surrogate"),
    ],
)
def test_a_broken_index(tmp_path: Path, text: Any, words: Any) -> None:
    save(tmp_path, checkpoint())
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(text)
    assert refusal(tmp_path, UNTIED).startswith(f"{index}{words}")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "a git-lfs pointer"),
        (b"", "not a readable safetensors file"),
        (b"\xff" * 40, "not a readable safetensors file"),
        ((8).to_bytes(8, "little") + b'{"a":\n}}', "not a readable safetensors file"),
    ],
)
def test_a_file_that_is_none(tmp_path: Path, content: Any, words: Any) -> None:
    save(tmp_path, checkpoint())
    (file,) = tmp_path.glob("*.safetensors")
    file.write_bytes(content)
    assert refusal(tmp_path, UNTIED).startswith(f"{file}: {words}")


def test_old_llama_files_have_buffers(tmp_path: Path) -> None:
    """What follows from rope_theta is neither missed nor read."""
    names = [f"model.layers.{n}.self_attn.rotary_emb.inv_freq" for n in range(LAYERS)]
    tensors = checkpoint() | {name: torch.ones(HEAD_DIM // 2) for name in names}
    check_checkpoint(save(tmp_path, tensors, files=2), UNTIED)
    other = {"model.layers.0.self_attn.rotary_emb.scale": torch.ones(1)}
    assert "has unknown 1 tensors" in refusal(save(tmp_path, tensors | other), UNTIED)


def test_weights_of_integers(tmp_path: Path) -> None:
    """Quantised, though config.json does not say so."""
    name = "model.layers.1.mlp.up_proj.weight"
    tensors = checkpoint()
    directory = save(tmp_path, tensors | {name: tensors[name].to(torch.int8)})
    assert f"{name} is of type I8: quantised weights are not supported" in refusal(
        directory, UNTIED
    )
