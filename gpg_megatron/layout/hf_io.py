"""Read a Hugging Face checkpoint into Megatron shards, each rank only the rows it holds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from gpg_megatron.errors import UserError
from gpg_megatron.layout.boxes import Shard
from gpg_megatron.layout.families import pieces_of
from gpg_megatron.layout.topology import hf_shapes
from gpg_megatron.model.fp8 import SUFFIX, scale_shape
from gpg_megatron.model.json_file import IS_POINTER, POINTER, plain, read_object, shown
from gpg_megatron.shapes import ModelShape
from gpg_megatron.types import ParallelPosition

BUFFER = ".rotary_emb.inv_freq"
"""End of the names that old Llama checkpoints have for what follows from rope_theta."""
FLOATS = ("F64", "F32", "F16", "BF16")
FP8 = "F8_E4M3"


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


def check_checkpoint(
    directory: str | Path, model: ModelShape, blocks: tuple[int, int] | None = None
) -> None:
    """Both ways: every tensor that the model needs is there, in its shape, and nothing else.

    Args:
        blocks: of scales, where tensors may be in FP8.

    Raises:
        UserError: a tensor is missing, unknown, of another shape or of integers; a file cannot
            be read.
    """
    files = index_of(directory)
    expected = hf_shapes(model)
    scaled = _scales(files, expected, blocks) if blocks else {}
    expected |= {name + SUFFIX: shape for name, shape in scaled.items()}
    beyond = range(model.num_layers, model.num_layers + model.extra_layers)
    extra = tuple(f"model.layers.{layer}." for layer in beyond)
    # Some exporters of tied models write the shared matrix under both names.
    ignored = {name for name in files if name.endswith(BUFFER) or name.startswith(extra)}
    if model.tied:
        ignored.add("lm_head.weight")
    for problem, wrong in (
        ("misses", expected.keys() - files.keys()),
        ("has unknown", files.keys() - expected.keys() - ignored),
    ):
        if wrong:
            some = ", ".join(map(plain, sorted(wrong)[:3]))
            raise UserError(
                f"{directory}: the checkpoint {problem} {len(wrong)} tensors for "
                f"{model.architecture}: {some}"
            )
    for path in sorted(set(files.values())):
        for name, (shape, dtype) in _tensors_in(path).items():
            if name in expected and dtype not in FLOATS and not (dtype == FP8 and name in scaled):
                raise UserError(
                    f"{path}: {name} is of type {dtype}: quantised weights are not supported"
                )
            if name in expected and shape != expected[name]:
                raise UserError(
                    f"{path}: {name} has shape {list(shape)}; expected {list(expected[name])} "
                    f"by config.json"
                )


def _scales(
    files: Mapping[str, Path], shapes: Mapping[str, tuple[int, ...]], blocks: tuple[int, int]
) -> dict[str, tuple[int, ...]]:
    """Matrices that have scales, and the shape of these."""
    return {
        name: scale_shape(shape, blocks)
        for name, shape in shapes.items()
        if len(shape) == 2 and name + SUFFIX in files
    }


def index_of(directory: str | Path) -> dict[str, Path]:
    """Tensor name -> safetensors file, from the index or from the files themselves.

    Raises:
        UserError: the index or a file cannot be read.
    """
    root = Path(directory)
    index = root / "model.safetensors.index.json"
    if not index.exists():
        return {
            name: path for path in sorted(root.glob("*.safetensors")) for name in _tensors_in(path)
        }
    names_of: dict[Path, list[str]] = {}
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise UserError(f"{index}: expected a JSON object with a weight_map")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file.endswith(".safetensors") or "\0" in file:
            raise UserError(f"{index}: {plain(name)} is in {shown(file)}; expected a *.safetensors")
        names_of.setdefault(root / file, []).append(name)
    for path, names in names_of.items():
        found = _tensors_in(path)
        for name in names:
            if name not in found:
                raise UserError(f"{path}: {plain(name)} is not in it, though {index.name} says so")
    return {name: path for path, names in names_of.items() for name in names}


def _tensors_in(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and type of the tensors of one file, from its header."""
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {name: (tuple(x.get_shape()), x.get_dtype()) for name, x in slices.items()}
    except (OSError, SafetensorError) as error:
        if path.is_file() and path.open("rb").read(len(POINTER)) == POINTER.encode():
            raise UserError(f"{path}: {IS_POINTER}") from None
        words = " ".join(str(error).split())
        raise UserError(f"{path}: not a readable safetensors file: {words}") from None
