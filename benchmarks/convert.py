"""Checkpoint conversion against a plain copy of the same files, in one run.

    python -m benchmarks.convert [--gb 2 | --qwen2-7b] [--dir DIR] [--repeats 3]

Every measured part ends with its files synced to the disk and runs in a process of its own. Before
it begins, a file of twice the model's size is written and removed: a virtual machine gives free
memory back to its host within seconds, and to fill memory that was given back costs more than the
copy. So every part finds as much memory that is still there. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median

import torch

from benchmarks.machine import machine
from gpg_megatron.checkpoint.safetensors_files import ShardWriter
from gpg_megatron.checkpoint.to_hf import megatron_to_hf
from gpg_megatron.checkpoint.to_megatron import hf_to_megatron
from gpg_megatron.layout.topology import PolicyGrid, hf_shapes
from gpg_megatron.model.shape import load_model_shape

QWEN2_7B = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
}
SMALLER = {
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "vocab_size": 65536,
}


def main() -> None:
    args = _parser().parse_args()
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        root = Path(folder)
        size = make_model(root / "hf", QWEN2_7B if args.qwen2_7b else smaller(args.gb))
        print(f"{machine()}; model of {size / 1e9:.2f} GB in bf16, {args.repeats} repeats")
        parts: dict[str, Callable[[Path], None]] = {
            "copy": copy_files,
            "hf_to_megatron": to_megatron,
            "megatron_to_hf": to_hf,
        }
        seconds: dict[str, list[float]] = {name: [] for name in parts}
        peaks: dict[str, float] = {}
        for _ in range(args.repeats):
            for name, part in parts.items():
                took, peak = in_own_process(part, root, size)
                seconds[name].append(took)
                peaks[name] = max(peak, peaks.get(name, 0.0))
                if name != "hf_to_megatron":  # the next part reads its files
                    remove_results(root)
                print(f"{name:15} {took:6.2f} s  {size / 1e9 / took:5.2f} GB/s  {peak:.2f} GB peak")
    copy = median(seconds["copy"])
    result = {
        "hf_to_megatron_over_copy": copy / median(seconds["hf_to_megatron"]),
        "megatron_to_hf_over_copy": copy / median(seconds["megatron_to_hf"]),
        "peak_rss_gb": max(peaks["hf_to_megatron"], peaks["megatron_to_hf"]),
        "copy_gb_per_s": size / 1e9 / copy,
        "model_gb": size / 1e9,
    }
    print(json.dumps({name: round(value, 3) for name, value in result.items()}))


def smaller(gigabytes: float) -> dict[str, int]:
    """As many layers as make up the size."""
    h, ffn, vocab = (SMALLER[k] for k in ("hidden_size", "intermediate_size", "vocab_size"))
    layer = 3 * h * ffn + 2 * h * h + 2 * h * 256
    layers = max(1, round((gigabytes * 1e9 / 2 - 2 * vocab * h) / layer))
    return {**SMALLER, "num_hidden_layers": layers}


def make_model(directory: Path, sizes: dict[str, int]) -> int:
    """Write a random untied Qwen2 model; returns the bytes of its tensors."""
    directory.mkdir()
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
        **sizes,
    }
    (directory / "config.json").write_text(json.dumps(config))
    shapes = hf_shapes(load_model_shape(directory, need_weights=False))
    writer = ShardWriter(directory, {n: (torch.bfloat16, s) for n, s in shapes.items()}, 5 * 10**9)
    for name, shape in shapes.items():
        writer.write(name, 0, torch.empty(shape, dtype=torch.bfloat16).uniform_(-0.1, 0.1))
    for file in writer.files:
        os.fsync(file.fileno())
        file.close()
    return sum(torch.Size(shape).numel() for shape in shapes.values()) * 2


def copy_files(root: Path) -> None:
    """What cp does, and a sync."""
    target = root / "copy"
    target.mkdir()
    for path in sorted((root / "hf").iterdir()):
        shutil.copyfile(path, target / path.name)
        with (target / path.name).open("rb") as file:
            os.fsync(file.fileno())


def to_megatron(root: Path) -> None:
    target = root / "megatron"
    shape = load_model_shape(root / "hf")
    layers = (0,) * shape.num_layers
    grid = PolicyGrid(tp_size=1, dp_size=1, pp_size=1, stage_of_layer=layers)
    hf_to_megatron(root / "hf", target, grid=grid)


def to_hf(root: Path) -> None:
    megatron_to_hf(root / "megatron", root / "back")


def remove_results(root: Path) -> None:
    """Everything but the model."""
    for path in root.iterdir():
        if path.name != "hf":
            shutil.rmtree(path)


def in_own_process(part: Callable[[Path], None], root: Path, size: int) -> tuple[float, float]:
    """(seconds of the part without the start of the process, peak resident GB)."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(part, root, size, sender))
    process.start()
    sender.close()
    result: tuple[float, float] = receiver.recv()
    process.join()
    return result


def warm_memory(path: Path, size: int) -> None:
    """Fill so much of the page cache, and free it."""
    block = bytes(64 << 20)
    with path.open("wb", buffering=0) as file:
        for _ in range(-(-size // len(block))):
            file.write(block)
    path.unlink()


def _measure(part: Callable[[Path], None], root: Path, size: int, sender: Connection) -> None:
    warm_memory(root / "warm", 2 * size)
    begin = time.perf_counter()
    part(root)
    seconds = time.perf_counter() - begin
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    sender.send((seconds, peak))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--gb", type=float, default=2.0, help="size of the model (default 2)")
    size.add_argument("--qwen2-7b", action="store_true", help="its real shape, 15 GB")
    parser.add_argument("--dir", help="where 3 times the size is free; default: the temporary one")
    parser.add_argument("--repeats", type=int, default=3)
    return parser


if __name__ == "__main__":
    main()
