"""The dry run of models of every size that people train, from config.json as it is published."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from gpg_megatron.config.loading import load_config
from gpg_megatron.errors import UserError
from gpg_megatron.model.shape import load_model_shape, shape_warnings
from gpg_megatron.start.dry_run import plan_run, problems
from gpg_megatron.start.run_plan import Machine
from tests.unit.published import LARGE, Large

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "qwen3-8b_math_megatron.yaml"
LIMIT_S = 30.0


def write(directory: Path, raw: dict[str, Any]) -> Path:
    (directory / "config.json").write_text(json.dumps(raw))
    return directory


def count_of_transformers(raw: dict[str, Any]) -> int:
    """Parameters, and the routers' biases, which are buffers there."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    known = raw | {"model_type": raw["model_type"].replace("kimi_k2", "deepseek_v3")}
    config = CONFIG_MAPPING[known.pop("model_type")](**known)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    state = sum(x.numel() for n, x in model.named_buffers() if n.endswith("correction_bias"))
    return int(state + sum(p.numel() for p in model.parameters()))


@pytest.mark.parametrize(("name", "large"), LARGE.items(), ids=LARGE)
def test_the_dry_run_of_a_published_model(tmp_path: Path, name: str, large: Large) -> None:
    """In bf16, as gpg-convert leaves it; what is published in FP8 is refused."""
    if "quantization_config" in large.raw:
        with pytest.raises(UserError, match="quantised weights"):
            load_model_shape(write(tmp_path, large.raw), need_weights=False)
    raw = {key: value for key, value in large.raw.items() if key != "quantization_config"}
    write(tmp_path, raw)
    assert shape_warnings(tmp_path) == []
    config = load_config(CONFIG, [f"model.path={tmp_path}", *large.overrides])
    begin = time.process_time()
    plan = plan_run(config, device="cuda", machine=Machine(gpu_gib=large.gpu_gib))
    seconds = time.process_time() - begin
    bridge, gpus = plan.publish, len(plan.memory_by_gpu)
    fullest = max(sum(parts) for _, *parts in plan.peaks.values()) / 2**30
    print(
        f"{name}: {plan.n_parameters:,} parameters, {gpus} GPUs, fullest {fullest:.1f} GiB, "
        f"{bridge.n_routes:,} rectangles, {2 * bridge.sent:,} bytes, {seconds:.2f} s"
    )
    assert plan.n_parameters == count_of_transformers(raw)
    assert plan.n_parameters / 1e9 == pytest.approx(large.billions, abs=0.05)
    assert bridge.sent == bridge.bound > large.engines * plan.n_parameters
    assert problems(plan) == []
    assert seconds < LIMIT_S
