"""The recipe's present model: its shipped layout, from config.json alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gpg_megatron.config.loading import load_config
from gpg_megatron.config.sections import GIB
from gpg_megatron.start.dry_run import plan_run, problems
from gpg_megatron.start.dry_run_text import lines
from gpg_megatron.start.run_plan import RunPlan

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "qwen3-8b_math_megatron.yaml"


def plan(folder: Path, *overrides: str) -> RunPlan:
    config = {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 4096,
        "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "rms_norm_eps": 1e-6,
        "max_position_embeddings": 40960, "rope_theta": 1e6, "tie_word_embeddings": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return plan_run(load_config(CONFIG, [f"model.path={folder}", *overrides]), device="cuda")


def test_it_fits_eight_gpus_of_80_gib(tmp_path: Path) -> None:
    found = plan(tmp_path)
    assert found.n_parameters == 8_190_735_360  # as published with the model
    assert problems(found) == []
    text = lines(found)
    assert "policy     8 ranks: TP2 PP2 DP2" in text
    assert "rollout    1,024 prompts x 5 = 5,120 responses of at most 2,048 tokens" in text
    # 36 layers, keys and values, 4 heads of 128 in bf16: 72 KiB a token of 40 GiB.
    assert found.engine.kv_bytes_per_token == 36 * 2 * 4 * 128 * 2
    assert found.limits.max_num_seqs == 256 and found.limits.max_num_batched_tokens == 16384


def test_the_recipes_micro_batch_needs_recompute(tmp_path: Path) -> None:
    (problem,) = problems(plan(tmp_path, "policy.recompute=none"))
    assert problem.startswith("4 of 8 GPUs are too small")  # those of the first stage
    _, policy, engine = plan(tmp_path).peaks[0]
    assert policy + engine == pytest.approx(48 * GIB, rel=0.01), "with it, the engines have most"
