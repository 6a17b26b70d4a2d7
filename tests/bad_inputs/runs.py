"""What output directories, checkpoints, conversions and hosts can have wrong."""

from __future__ import annotations

import fcntl
from pathlib import Path
from typing import TextIO

from tests.bad_inputs.case import Case, given

OLD = "old/checkpoints/step_2"
_held: list[TextIO] = []


def hold(path: Path) -> None:
    """As another process of this host does."""
    path.parent.mkdir()
    file = path.open("w")
    file.write("host a, process 1\n")
    file.flush()
    fcntl.flock(file, fcntl.LOCK_EX)
    _held.append(file)


def large_norm(path: Path) -> None:
    """A norm with weights of 1e6."""
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    tensors["model.norm.weight"] = torch.full_like(tensors["model.norm.weight"], 1e6)
    save_file(tensors, path)


def convert(name: str, *arguments: str) -> Case:
    """gpg-convert of the model."""
    words = ("hf-to-megatron", "--hf", "model", *arguments)
    return given(name, *words, command="gpg-convert")


RUN_CASES = (
    given("an output directory that is a file", "trainer.output_dir=train.jsonl"),
    given("an output directory below a file", "trainer.output_dir=train.jsonl/run"),
    Case(
        name="an output directory that another run holds",
        brings="`trainer.output_dir=busy`",
        arguments=("trainer.output_dir=busy",),
        files={"busy/lock": hold},
    ),
    given("a checkpoint that is not there", "checkpoint.resume=nowhere"),
    Case(
        name="a checkpoint whose save was cut off",
        brings=f"`checkpoint.resume={OLD}` without complete.json",
        arguments=(f"checkpoint.resume={OLD}",),
        files={f"{OLD}/common.pt": ""},
    ),
    Case(
        name="a checkpoint with a damaged marker",
        brings="`[[[[...` in complete.json",
        arguments=(f"checkpoint.resume={OLD}",),
        files={f"{OLD}/complete.json": "[" * 100_000},
    ),
    Case(
        name="a checkpoint of a later version",
        brings='`{"format": 9, "digest": ""}` in complete.json',
        arguments=(f"checkpoint.resume={OLD}",),
        files={f"{OLD}/complete.json": '{"format": 9, "digest": ""}'},
    ),
    Case(
        name="a run that has checkpoints, and shall not use them",
        brings="`checkpoint.resume=never trainer.output_dir=old`",
        arguments=("checkpoint.resume=never", "trainer.output_dir=old"),
        files={f"{OLD}/complete.json": "{}"},
    ),
    Case(
        name="a host with too few files",
        brings="`ulimit -n 64`",
        shell="ulimit -n 64",
    ),
)
CONVERT_CASES = (
    Case(
        name="a type that cannot hold a weight",
        brings="`--dtype fp16`, a weight of 1e6",
        command="gpg-convert",
        arguments=("hf-to-megatron", "--hf", "model", "--megatron", "new", "--dtype", "fp16"),
        files={"model/model.safetensors": large_norm},
    ),
    convert("ranks that do not divide the heads", "--megatron", "new", "--tp", "3"),
    convert("no ranks", "--megatron", "new", "--pp", "0"),
    convert("a target that has files", "--megatron", "model"),
    convert("a target below a file", "--megatron", "train.jsonl/new"),
    given(
        "a source that is no checkpoint",
        "megatron-to-hf",
        "--megatron",
        "model",
        "--hf",
        "new",
        command="gpg-convert",
    ),
)
