"""A Transformer Engine that is installed and cannot be used is found before a run starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest

from gpg_megatron.policy.transformer_engine import (
    _NAMES,
    has_transformer_engine,
    transformer_engine_problem,
)

ROOT = Path(__file__).resolve().parents[2]
MACHINE_WITH_GPUS = """
import sys, torch
torch.cuda.is_available, torch.cuda.device_count = lambda: True, lambda: 8
from gpg_megatron.start.train import main
sys.exit(main(["--config", "configs/qwen2-7b_math_megatron.yaml", *sys.argv[1:]]))
"""


def test_a_build_for_another_torch_is_one_line_of_preflight(tmp_path: Path) -> None:
    config = {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 128,
        "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 320, "rms_norm_eps": 1e-6,
        "max_position_embeddings": 4096, "rope_theta": 1e6, "tie_word_embeddings": True,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    package = tmp_path / "transformer_engine"
    package.mkdir()
    error = "transformer_engine_torch.so: undefined symbol: _ZN3c104cuda9SetDeviceEi"
    (package / "__init__.py").write_text(f"raise ImportError({error!r})\n")
    done = subprocess.run(
        [sys.executable, "-c", MACHINE_WITH_GPUS, f"model.path={tmp_path}"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}", "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    (line,) = [x for x in done.stderr.splitlines() if not x.startswith("warning:")]
    assert line == (
        "error: Transformer Engine of an unknown version is installed, but Megatron cannot use it: "
        f"import transformer_engine: {error}; expected a build for this torch "
        "(docs/install-gpu.md), or none: pip uninstall transformer-engine "
        "transformer-engine-torch"
    )


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    """Modules that have every name, after Megatron was imported without them."""
    assert not has_transformer_engine()
    modules = {}
    for module, names in _NAMES.items():
        modules[module] = ModuleType(module)
        modules[module].__spec__ = ModuleSpec(module, None)
        for name in names:
            setattr(modules[module], name, object())
        monkeypatch.setitem(sys.modules, module, modules[module])
    return modules


def test_a_name_that_is_gone_is_said(stand_in: dict[str, ModuleType]) -> None:
    del stand_in["transformer_engine.pytorch.fp8"].__dict__["fp8_autocast"]
    assert "transformer_engine.pytorch.fp8 has no fp8_autocast" in transformer_engine_problem()


def test_the_last_word_is_megatrons(stand_in: dict[str, ModuleType]) -> None:
    assert stand_in
    problem = transformer_engine_problem()
    assert "cannot use it: megatron.core.extensions.transformer_engine.HAVE_TE is false" in problem


def test_without_it_nothing_is_wrong() -> None:
    assert transformer_engine_problem() == ""
