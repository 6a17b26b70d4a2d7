"""Read a Hugging Face checkpoint into Megatron shards, each rank only the rows it holds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open

from gpg_megatron.bridge.families import hf_names, pieces_of
from gpg_megatron.bridge.layout import Shard
from gpg_megatron.errors import UserError
from gpg_megatron.types import ModelShape, ParallelPosition


def load_hf(
    directory: str | Path,
    shards: Mapping[str, torch.Tensor],
    model: ModelShape,
    position: ParallelPosition,
) -> None:
    """Fill this rank's parameter shards in place; padding rows become zero.

    Args:
        shards: global Megatron name -> local tensor, as Policy.named_shards returns them.

    Raises:
        UserError: a tensor has another shape than config.json says.
    """
    files = index_of(directory)
    for name, tensor in shards.items():
        shard = Shard(tuple(tensor.shape), position.tp_rank, position.tp_size)
        tensor.zero_()
        for piece in pieces_of(name, shard, model):
            with safe_open(files[piece.hf_name], framework="pt") as file:
                source = file.get_slice(piece.hf_name)
                shape = source.get_shape()
                if any(stop > n for (_, stop), n in zip(piece.hf.ranges, shape, strict=True)):
                    raise UserError(
                        f"{files[piece.hf_name]}: {piece.hf_name} has shape {shape}, but "
                        f"{name} needs its box {piece.hf.ranges}; does config.json match?"
                    )
                tensor[piece.local.slices].copy_(source[piece.hf.slices])


def check_checkpoint(directory: str | Path, model: ModelShape) -> None:
    """Both ways: every tensor that the model needs is there, and nothing else.

    Raises:
        UserError: names of tensors that are missing or unknown.
    """
    names = index_of(directory).keys()
    expected = set(hf_names(model))
    # Some exporters of tied models write the shared matrix under both names.
    ignored = {"lm_head.weight"} if model.tied else set()
    for problem, wrong in (
        ("misses", expected - names),
        ("has unknown", names - expected - ignored),
    ):
        if wrong:
            some = ", ".join(sorted(wrong)[:3])
            raise UserError(
                f"{directory}: the checkpoint {problem} {len(wrong)} tensors for "
                f"{model.architecture}: {some}"
            )


def index_of(directory: str | Path) -> dict[str, Path]:
    """Tensor name -> safetensors file, from the index or from the files themselves."""
    root = Path(directory)
    index = root / "model.safetensors.index.json"
    if index.exists():
        weight_map = json.loads(index.read_text())["weight_map"]
        return {name: root / file for name, file in weight_map.items()}
    found: dict[str, Path] = {}
    for path in sorted(root.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found.update(dict.fromkeys(file.keys(), path))
    return found
