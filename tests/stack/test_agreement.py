"""Planted faults against real vLLM engines: each is refused in every pair of types, and nothing
else is.

One process of engines and one of policies serve all cases.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny import Family, make_tiny_model

HERE = Path(__file__).resolve().parent
LIMIT_S = 600
PROMPTS = [[(7 * i + 31 * j) % 250 + 1 for j in range(8 + 5 * i)] for i in range(8)]
TYPES = [("fp32", "fp32"), ("bf16", "bf16"), ("fp32", "bf16"), ("bf16", "fp32")]
VLLM_NAMES = {"fp32": "float32", "bf16": "bfloat16"}
FAMILIES: tuple[Family, ...] = ("qwen2", "qwen3")
FAULT_OF = {"qwen2": "lost biases", "qwen3": "swapped q and k norms"}


def make_model(directory: Path, family: Family) -> Path:
    """A tiny model that would not stay the same without its biases, norms or positions."""
    from transformers import AutoModelForCausalLM

    make_tiny_model(directory, family=family, num_layers=4, sharpness=3.0)
    model = AutoModelForCausalLM.from_pretrained(directory)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            if name.endswith("bias"):
                parameter.copy_(drawn)
            elif name.endswith(("q_norm.weight", "k_norm.weight")):
                parameter.copy_(1.0 + 0.5 * drawn)
            elif "_proj" in name:
                parameter.mul_(2.0)
    model.save_pretrained(directory)
    return directory


def run_script(name: str, jobs: list[dict[str, Any]], folder: Path) -> list[Any]:
    """What the script writes for the jobs."""
    given, results = folder / f"{name}.jobs.json", folder / f"{name}.json"
    given.write_text(json.dumps(jobs))
    done = subprocess.run(
        [sys.executable, "-m", f"tests.stack.{name}", str(given), str(results)],
        cwd=HERE.parents[1],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    found: list[Any] = json.loads(results.read_text())
    return found


Verdicts = Callable[[str, str, str], dict[str, Any]]


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> Verdicts:
    """By family, type of the policy and type of the engine."""
    folder = tmp_path_factory.mktemp("agreement")
    models = {family: str(make_model(folder / family, family)) for family in FAMILIES}
    engines = [(family, dtype) for family in FAMILIES for dtype in ("fp32", "bf16")]
    jobs = [
        {"model": models[family], "dtype": VLLM_NAMES[dtype], "prompts": PROMPTS}
        for family, dtype in engines
    ]
    sampled = run_script("agreement_engine", jobs, folder)
    samples = dict(zip(engines, sampled, strict=True))
    cases = [(family, *types) for family in FAMILIES for types in TYPES]
    jobs = [
        {
            "model": models[family],
            "dtype": policy,
            "engine_dtype": engine,
            "samples": samples[family, engine],
        }
        for family, policy, engine in cases
    ]
    found = dict(zip(cases, run_script("agreement_policy", jobs, folder), strict=True))
    for case, seen in found.items():
        print(case, {k: f"{v['mean']:.2g} of {v['limit']:.2g}" for k, v in seen.items()})
    return lambda *case: found[case]


@pytest.mark.slow
@pytest.mark.parametrize("types", TYPES, ids="-".join)
@pytest.mark.parametrize("family", FAMILIES)
def test_planted_faults_are_refused_and_right_engines_are_not(
    verdicts: Verdicts, family: str, types: tuple[str, str]
) -> None:
    seen = verdicts(family, *types)
    for name in ("none", "none, again"):
        assert seen[name]["error"] is None, seen[name]
        assert seen[name]["mean"] < seen[name]["limit"] / 2, "as far from a refusal as this"
    for name in ("other rope base", FAULT_OF[family], "stale by 1"):
        assert seen[name]["error"] is not None, (name, seen[name])
