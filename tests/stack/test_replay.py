"""The experts of a real engine reach the policy, which computes with them and no others."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gpg_megatron.config.sections import Config, ModelConfig
from gpg_megatron.types import Routing, TrainSample
from tests.dist.reference import make_reference
from tests.tiny import make_tiny_model

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 600
N_EXPERTS, LAYERS, PER_TOKEN = 4, 3, 2
N, MAX_TOKENS = 3, 12
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny_moe")
    return make_tiny_model(folder, family="qwen3_moe", num_layers=LAYERS, sharpness=3.0)


@pytest.fixture(scope="module")
def seen(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What replay_both.py saw, and the samples of the engine."""
    folder = tmp_path_factory.mktemp("replay")
    command = [sys.executable, "-m", "tests.stack.replay_both", str(model), str(folder)]
    done = subprocess.run(
        [*command, str(N), str(MAX_TOKENS)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    found: dict[str, Any] = json.loads((folder / "seen.json").read_text())
    return found | {"samples": pickle.loads((folder / "samples.pickle").read_bytes())}


def test_every_token_that_was_computed_has_experts(seen: dict[str, Any]) -> None:
    samples: list[TrainSample] = seen["samples"]
    assert len({s.group for s in samples}) > 2 and len(samples) % N == 0
    for sample in samples:
        rows = sample.routing
        n_prompt, n_response = len(sample.prompt_token_ids), len(sample.response_token_ids)
        assert rows.prompt.shape == (n_prompt - 1, LAYERS, PER_TOKEN)
        assert rows.response.shape == (n_response, LAYERS, PER_TOKEN)
        for each in (rows.prompt, rows.response):
            assert each.dtype == np.uint8 and (each < N_EXPERTS).all()
            assert (each[..., 0] != each[..., 1]).all()


def test_in_fp32_the_policy_would_choose_the_same(seen: dict[str, Any]) -> None:
    assert seen["engine's"]["policy/routing_differs"] == 0.0
    engine, with_, without = (torch.tensor(seen[k]) for k in ("engine", "with", "without"))
    assert (with_ - engine).abs().max() < 1e-4
    assert (with_ - without).abs().max() < 1e-5


def test_with_other_experts_its_log_probs_are_those_of_a_model_with_these(
    seen: dict[str, Any], model: Path
) -> None:
    """Of transformers in float64, one sequence at a time."""
    others = [other_experts(sample) for sample in seen["samples"]]
    config = Config(model=ModelConfig(path=str(model)))
    right = make_reference(config, [[replace(s, advantage=0.0) for s in others]]).logprobs
    given, with_ = torch.tensor(seen["other"]).double(), torch.tensor(seen["with"]).double()
    assert (given - right).abs().max() < 1e-4
    assert (with_ - right).abs().max() > 0.1, "the experts make a difference"
    assert seen["other's"]["policy/routing_differs"] > 0.1


def other_experts(sample: TrainSample) -> TrainSample:
    """Everything to the next expert."""
    prompt, response = (
        ((rows + 1) % N_EXPERTS).astype(np.uint8)
        for rows in (sample.routing.prompt, sample.routing.response)
    )
    return replace(sample, routing=Routing(prompt=prompt, response=response))
