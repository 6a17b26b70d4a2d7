"""The flagship's scripts, as far as they go without starting anything."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gpg_megatron.config.sections import Config, PolicyConfig
from gpg_megatron.errors import UserError
from gpg_megatron.start.hosts import Hosts, add_host_options, hosts_of
from gpg_megatron.start.launcher import launch

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = (
    "run_qwen2-7b_math_megatron.sh",
    "run_qwen2-7b_math.sh",
    "run_qwen3-8b_math_megatron.sh",
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's config.json, and raw data in the columns of the two data sets."""
    folder = tmp_path_factory.mktemp("flagship")
    config = {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2",
        "hidden_size": 128, "intermediate_size": 256,
        "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
        "vocab_size": 320, "rms_norm_eps": 1e-6, "max_position_embeddings": 4096,
        "rope_theta": 1e6, "tie_word_embeddings": True,
    }  # fmt: skip
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text(json.dumps(config))
    (folder / "raw").mkdir()
    for split, n in (("train", 6), ("test", 2)):
        gsm8k = [{"question": f"{split} {i}?", "answer": f"#### {i}"} for i in range(n)]
        math = [{"problem": f"{split} {i}?", "solution": f"\\boxed{{{i}}}"} for i in range(n)]
        for name, rows in (("gsm8k", gsm8k), ("math", math)):
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / "raw" / f"{name}_{split}.jsonl").write_text(text)
    return folder


def run(
    script: str, place: Path, *arguments: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    given = {
        "PATH": os.environ["PATH"],
        "GPG_PYTHON": sys.executable,
        "MODEL_PATH": str(place / "model"),
        "DATA_DIR": str(place / "data"),
        "DATA_SOURCE": str(place / "raw"),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    return subprocess.run(
        [ROOT / "launch" / script, *arguments],
        env=given | environment,
        cwd=place,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_script_makes_the_data_and_hands_everything_on(script: str, place: Path) -> None:
    done = run(script, place, "--dry-run", "trainer.train_batch_size=512", DEVICE="cpu")
    assert done.returncode == 0
    assert done.stderr == ""
    assert "off-policy correction: truncate-token" in done.stdout
    for name in ("gsm8k", "math"):
        assert (place / "data" / name / "train.parquet").is_file()
    layout = "4 ranks: TP2 PP2 DP1" if "megatron" in script else "1 ranks: TP1 PP1 DP1"
    assert f"policy     {layout}" in done.stdout
    assert "policy fp32, engines fp32" in done.stdout
    assert "512 prompts x 5 = 2,560 responses" in done.stdout
    assert "epoch      12 prompts" in done.stdout
    again = run(script, place, "--dry-run", DEVICE="cpu")
    assert "parquet" not in again.stdout, "data that is there is left alone"


def test_on_gpus_the_layout_is_the_configurations(place: Path) -> None:
    done = run(SCRIPTS[0], place, "--dry-run", DEVICE="cuda")
    assert "policy     8 ranks: TP2 PP2 DP2" in done.stdout
    assert "policy bf16, engines bf16" in done.stdout


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"GPG_PYTHON": "no-such-python"}, "no-such-python: no such program; docs/install-gpu.md"),
        ({"NNODES": "2"}, "NNODES is 2: MASTER_ADDR must name the first host"),
        ({"NNODES": "2", "MASTER_ADDR": "h"}, "NNODES is 2: NODE_RANK must be 0 on the first"),
        (
            {"NNODES": "2", "MASTER_ADDR": "h", "NODE_RANK": "2"},
            "error: --node-rank is 2; expected 0 to 1 with --nnodes 2",
        ),
        ({"MODEL_PATH": "/nowhere"}, "model.path: no such directory: /nowhere"),
        ({"DATA_SOURCE": "/nowhere", "DATA_DIR": "/tmp/nowhere"}, "--source /nowhere: no such"),
    ],
)
def test_mistakes(place: Path, environment: dict[str, str], message: str) -> None:
    done = run(SCRIPTS[0], place, "--dry-run", **environment)
    assert done.returncode != 0 and message in done.stderr
    assert "Traceback" not in done.stderr


def test_the_scripts_set_paths_and_device_alone() -> None:
    scripts = [*(ROOT / "launch").glob("*.sh"), *(ROOT / "launch" / "slurm").iterdir()]
    lines = [x for file in scripts for x in file.read_text().splitlines() if x[:1] != "#"]
    sections = dataclasses.asdict(Config())
    keys = {f"{section}.{key}" for section, values in sections.items() for key in values}
    assert {key for key in keys if any(f"{key}=" in line for line in lines)} == {
        "data.train_files", "data.val_files", "model.path", "trainer.output_dir",
        "trainer.device",
    }  # fmt: skip


def test_several_hosts_refuse_a_transport_of_one_host(place: Path) -> None:
    several = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "NODE_RANK": "1", "DEVICE": "cpu"}
    done = run(SCRIPTS[0], place, "bridge.transport=shm", **several)
    assert done.returncode == 2
    assert done.stderr == (
        "error: bridge.transport=shm needs policy ranks and engines on one host, and --nnodes is "
        "2; expected auto, gloo or nccl\n"
    )


def test_each_policy_rank_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    config = Config(policy=PolicyConfig(tensor_model_parallel_size=2))
    with pytest.raises(UserError, match="to run 2 policy ranks, and torch sees 1 CUDA"):
        launch(config, [], Hosts())


def test_a_host_has_no_fewer_than_no_ranks() -> None:
    parser = argparse.ArgumentParser()
    add_host_options(parser)
    host = ["--nnodes", "2", "--node-rank", "1", "--master-addr", "h", "--nproc-per-node"]
    assert hosts_of(parser.parse_args([*host, "0"])).ranks_here == 0
    with pytest.raises(UserError, match="--nproc-per-node is -1; expected at least 0"):
        hosts_of(parser.parse_args([*host, "-1"]))


SLURM = ROOT / "launch" / "slurm"
BATCH_FILES = sorted(SLURM.glob("*.sbatch"))


def options_of(file: Path) -> dict[str, str]:
    lines = [x for x in file.read_text().splitlines() if x.startswith("#SBATCH ")]
    return dict(line.removeprefix("#SBATCH --").partition("=")[::2] for line in lines)


def test_the_batch_files_differ_in_the_number_of_nodes_alone() -> None:
    first, second = (options_of(file) for file in BATCH_FILES)
    assert first.pop("nodes") == "1" and int(second.pop("nodes")) > 1
    assert first == second
    assert "requeue" in first and first["signal"].startswith("B:USR1@")
    assert first["ntasks-per-node"] == "1", "the launcher starts the ranks of its node"


def test_a_batch_job_removes_what_other_launchers_left() -> None:
    stale = {
        "RANK": "7", "LOCAL_RANK": "1", "WORLD_SIZE": "9", "MASTER_ADDR": "x", "NNODES": "3",
        "TORCHELASTIC_RUN_ID": "x", "GROUP_RANK": "1", "PYTHONPATH": "x", "RAY_ADDRESS": "x",
        "GPG_RUN_ID": "x", "ROCR_VISIBLE_DEVICES": "0",
    }  # fmt: skip
    kept = {"MODEL_PATH": "m", "CUDA_VISIBLE_DEVICES": "0,1", "SLURM_JOB_ID": "5", "HOME": "/h"}
    script = f"source {SLURM / 'job.sh'}; sanitise_environment; exec {sys.executable} -c "
    script += "'import json, os; print(json.dumps(dict(os.environ)))'"
    done = subprocess.run(
        ["bash", "-euc", script],
        env=stale | kept | {"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    after = json.loads(done.stdout)
    assert not after.keys() & stale.keys()
    assert kept.items() <= after.items()
