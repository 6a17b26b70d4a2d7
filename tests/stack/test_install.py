"""Updates of real vLLM engines end in what transformers computes with the same checkpoint.

Every engine is loaded with A, probed, updated to B, then back to A in the reverse order.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PROMPTS = [[5, 60, 7, 80, 9, 100], [200, 3, 33, 133]]
FAMILIES = ("qwen2_tied", "llama_untied", "qwen3moe_untied", "qwen3moe_tied")
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.15}
VOCABULARY = 300
"""No multiple of 64: the engine pads it."""


def build(kind: str, seed: int) -> Any:
    import torch
    import transformers as hf

    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.1,
        "tie_word_embeddings": kind.endswith("_tied"),
    }
    torch.manual_seed(seed)
    if kind == "qwen2_tied":
        model = hf.Qwen2ForCausalLM(hf.Qwen2Config(**shape))
    elif kind == "llama_untied":
        model = hf.LlamaForCausalLM(hf.LlamaConfig(**shape))
    else:
        experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
        model = hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**shape, **experts, head_dim=32))
    for parameter in model.parameters():
        if parameter.ndim == 1:  # norms and biases: none may be forgotten unseen
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model.float().eval()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """Family -> [A, B]."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for family in FAMILIES:
        for seed, name in enumerate("AB"):
            build(family, seed).save_pretrained(folder / family / name)
    return {family: [folder / family / name for name in "AB"] for family in FAMILIES}


def expected(folder: Path, dtype: str) -> list[float]:
    """Log-probs of the prompts, computed in fp32 with weights rounded to dtype."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).float()
    result = []
    with torch.no_grad():
        for prompt in PROMPTS:
            rows = model(torch.tensor([prompt])).logits[0, :-1].log_softmax(-1)
            result += rows.gather(-1, torch.tensor(prompt[1:])[:, None])[:, 0].tolist()
    return result


def gap(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def run_engines(
    checkpoints: dict[str, list[Path]],
    folder: Path,
    engines: list[tuple[str, str, bool]],
    *,
    tp: int = 1,
) -> list[dict[str, Any]]:
    """Start engines (family, dtype, eager), check their log-probs, return what they reported."""
    jobs = [
        {
            "load": str(checkpoints[family][0]),
            "updates": [str(checkpoints[family][1]), str(checkpoints[family][0])],
            "dtype": dtype,
            "eager": eager,
            "tp": tp,
            "prompts": PROMPTS,
        }
        for family, dtype, eager in engines
    ]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, str(REPOSITORY / "tests/stack/install_engine.py")]
    done = subprocess.run(
        [*command, str(folder / "jobs.json"), str(folder / "results.json")],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    results: list[dict[str, Any]] = json.loads((folder / "results.json").read_text())
    for (family, dtype, _), result in zip(engines, results, strict=True):
        a, b = (expected(path, dtype) for path in checkpoints[family])
        check(result, a, b, TOLERANCE[dtype])
    return results


def check(result: dict[str, Any], a: list[float], b: list[float], tolerance: float) -> None:
    assert gap(a, b) > 1, "else nothing is tested"
    assert gap(result["loaded"], a) < tolerance
    assert result["probed"] == result["loaded"], "a probe leaves the weights as they are"
    to_b, to_a = result["updates"]
    assert gap(to_b["logprobs"], b) < tolerance
    assert gap(to_a["logprobs"], a) < tolerance
    assert [to_b["staged"][1], to_a["staged"][1]] == [0, 0], "staging is freed"


def test_one_worker(checkpoints: dict[str, list[Path]], tmp_path: Path) -> None:
    engines = [(family, "float32", True) for family in FAMILIES[:3]]
    engines.append(("qwen3moe_untied", "bfloat16", True))
    # A compiled model's graphs were traced with the kernels of the loaded weights.
    engines.append(("qwen3moe_tied", "float32", False))
    results = run_engines(checkpoints, tmp_path, engines)
    for (family, dtype, _), result in zip(engines, results, strict=True):
        policies = result["policies"]
        layer = "model.layers.0"
        linear = f"{layer}.self_attn.qkv_proj"
        is_packed = linear in result["packed_away"]
        assert is_packed or dtype != "float32"
        assert policies[linear] == ("stage" if is_packed else "refresh")
        assert policies[f"{layer}.input_layernorm"] == policies["model.norm"] == "live"
        assert policies["lm_head"] == "refresh", "its weight stays, and a packed copy is read"
        largest = 2 * 256 * 128 if is_packed else 0
        if family.startswith("qwen3moe"):
            assert policies[f"{layer}.mlp.experts.routed_experts"] == "stage"
            largest = 4 * 3 * 64 * 128
        most, _ = result["updates"][0]["staged"]
        # In the loaders' order only one module is open at a time.
        assert most == largest * {"float32": 4, "bfloat16": 2}[dtype]
        assert "the update is incomplete in" in result["finish_early"]


def test_two_workers(checkpoints: dict[str, list[Path]], tmp_path: Path) -> None:
    run_engines(checkpoints, tmp_path, [("qwen3moe_tied", "float32", True)], tp=2)
