"""Read a Hugging Face checkpoint into Megatron shards, each rank only the rows it holds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from gpg_megatron.errors import UserError
from gpg_megatron.layout.boxes import Shard
from gpg_megatron.layout.families import pieces_of
from gpg_megatron.layout.topology import hf_shapes
from gpg_megatron.types import ModelShape, ParallelPosition


def load_hf(
    directory: str | Path,
    shards: Mapping[str, torch.Tensor],
    model: ModelShape,
    position: ParallelPosition,
) -> None:
    """Fill this rank's parameter shards in place; padding rows become zero.

    Args:
        directory: has passed check_checkpoint.
        shards: global Megatron name -> local tensor, as Policy.named_shards returns them.
    """
    files = index_of(directory)
    for name, tensor in shards.items():
        shard = Shard(tuple(tensor.shape), position.tp_rank, position.tp_size)
        tensor.zero_()
        for piece in pieces_of(name, shard, model):
            with safe_open(files[piece.hf_name], framework="pt") as file:
                source = file.get_slice(piece.hf_name)
                tensor[piece.local.slices].copy_(source[piece.hf.slices])


def check_checkpoint(directory: str | Path, model: ModelShape) -> None:
    """Both ways: every tensor that the model needs is there, in its shape, and nothing else.

    Raises:
        UserError: a tensor is missing, unknown, or has another shape; a file cannot be read.
    """
    files = index_of(directory)
    expected = hf_shapes(model)
    # Some exporters of tied models write the shared matrix under both names.
    ignored = {"lm_head.weight"} if model.tied else set()
    for problem, wrong in (
        ("misses", expected.keys() - files.keys()),
        ("has unknown", files.keys() - expected.keys() - ignored),
    ):
        if wrong:
            some = ", ".join(sorted(wrong)[:3])
            raise UserError(
                f"{directory}: the checkpoint {problem} {len(wrong)} tensors for "
                f"{model.architecture}: {some}"
            )
    for path in sorted(set(files.values())):
        for name, shape in _shapes_in(path).items():
            if name in expected and shape != expected[name]:
                raise UserError(
                    f"{path}: {name} has shape {list(shape)}; expected {list(expected[name])} "
                    f"by config.json"
                )


def index_of(directory: str | Path) -> dict[str, Path]:
    """Tensor name -> safetensors file, from the index or from the files themselves.

    Raises:
        UserError: the index or a file cannot be read.
    """
    root = Path(directory)
    index = root / "model.safetensors.index.json"
    if not index.exists():
        return {
            name: path for path in sorted(root.glob("*.safetensors")) for name in _shapes_in(path)
        }
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        files = {str(name): root / file for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{index}: expected a JSON object with a weight_map") from None
    for path in set(files.values()):
        found = _shapes_in(path).keys()
        for name in (name for name, file in files.items() if file == path):
            if name not in found:
                raise UserError(f"{path}: {name} is not in it, though {index.name} says so")
    return files


def _shapes_in(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of one file, from its header."""
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            return {name: tuple(file.get_slice(name).get_shape()) for name in names}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: not a readable safetensors file: {error}") from None
