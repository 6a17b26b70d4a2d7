"""The dry run: counts by hand, from config.json alone, and what would not fit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.large_layouts import CASES as LARGE
from benchmarks.large_layouts import LargeCase
from gpg_megatron.bridge.forecast import forecast, worker_elements
from gpg_megatron.bridge.links import Distance, Links, Seat
from gpg_megatron.config.loading import load_config
from gpg_megatron.config.sections import GIB, Config
from gpg_megatron.data.schema import make_row, write_parquets
from gpg_megatron.errors import UserError
from gpg_megatron.host.reaper import RUN_ID_VARIABLE
from gpg_megatron.placement.memory import fitting_limits
from gpg_megatron.start import train
from gpg_megatron.start.dry_run import plan_run, problems
from gpg_megatron.start.dry_run_text import lines
from gpg_megatron.start.run_plan import Machine, count_rows
from tests.tiny import write_problems

ROOT = Path(__file__).resolve().parents[2]
SHAPES = {
    "qwen2-7b": (3584, 18944, 28, 28, 4),
    "qwen2.5-72b": (8192, 29568, 80, 64, 8),
}
QWEN3: dict[str, dict[str, object]] = {
    "qwen3-8b": {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 4096,
        "intermediate_size": 12288, "num_hidden_layers": 36, "num_key_value_heads": 8,
    },
    "qwen3-30b-a3b": {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": 2048,
        "intermediate_size": 6144, "num_hidden_layers": 48, "num_key_value_heads": 4,
        "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768,
        "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directories with a config.json and nothing else."""
    folder = tmp_path_factory.mktemp("models")
    for name, (hidden, ffn, layers, heads, kv_heads) in SHAPES.items():
        (folder / name).mkdir()
        config = {
            "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2",
            "hidden_size": hidden, "intermediate_size": ffn,
            "num_hidden_layers": layers, "num_attention_heads": heads,
            "num_key_value_heads": kv_heads, "vocab_size": 152064, "rms_norm_eps": 1e-6,
            "max_position_embeddings": 32768, "rope_theta": 1e6, "tie_word_embeddings": False,
        }  # fmt: skip
        (folder / name / "config.json").write_text(json.dumps(config))
    for name, own in QWEN3.items():
        (folder / name).mkdir()
        config = own | {
            "vocab_size": 151936, "num_attention_heads": 32, "head_dim": 128,
            "rms_norm_eps": 1e-6, "max_position_embeddings": 40960, "rope_theta": 1e6,
            "tie_word_embeddings": False, "hidden_act": "silu",
        }  # fmt: skip
        (folder / name / "config.json").write_text(json.dumps(config))
    return folder


def flagship(models: Path, *overrides: str) -> Config:
    """The shipped configuration, with a model of which only the shape is there."""
    model = f"model.path={models / 'qwen2-7b'}"
    return load_config(ROOT / "configs/qwen2-7b_math_megatron.yaml", [model, *overrides])


def test_the_flagship_by_the_numbers(models: Path) -> None:
    plan = plan_run(flagship(models), device="cuda")
    assert plan.n_parameters == 7_615_616_512  # as published with the model
    assert [stage.ranks for stage in plan.stages] == [(0, 1, 2, 3), (4, 5, 6, 7)]
    text = "\n".join(lines(plan))
    assert "policy     8 ranks: TP2 PP2 DP2" in text
    assert "engines    4 x TP2 = 8 workers" in text
    assert "  stage 1: layers 14-27, ranks 4-7" in text.splitlines()
    assert "1,024 prompts x 5 = 5,120 responses" in text
    assert "updates    4 per rollout batch, 256 prompts = 1,280 responses each; 840 in 210" in text
    assert "epoch      unknown" in text
    # Two copies of 7.6e9 parameters in bf16 would be 28.4 GiB; norms go to both workers.
    assert plan.publish.sent == plan.publish.bound
    assert plan.publish.sent / 4 == pytest.approx(plan.n_parameters, rel=1e-4)


def test_a_stage_of_several_runs_of_layers(models: Path) -> None:
    virtual = "policy.virtual_pipeline_model_parallel_size=2"
    plan, even = (plan_run(flagship(models, *x), device="cuda") for x in ([virtual], []))
    text = lines(plan)
    assert "policy     8 ranks: TP2 PP2 VPP2 DP2" in text
    assert "  stage 1: layers 7-13, 21-27, ranks 4-7" in text
    # Passes through half of a stage's layers: 5 instead of 2 through all, 3 instead of 1.
    for stage, alone, share in zip(plan.stages, even.stages, (5 / 4, 3 / 2), strict=True):
        assert stage.memory.activations == share * alone.memory.activations
        assert stage.memory.parameters == alone.memory.parameters
    assert plan.publish.sent == plan.publish.bound


def test_the_flagship_fits_eight_gpus_of_80_gib(models: Path) -> None:
    config = flagship(models)
    assert config.policy.world_size == 8
    assert problems(plan_run(config, device="cuda")) == []


def test_colocated_gpus_hold_the_most_of_a_state_and_not_the_sum(models: Path) -> None:
    plan = plan_run(flagship(models), device="cuda")
    memory, engine = plan.stages[0].memory, plan.engine
    assert plan.engine_gpus == range(8)
    assert plan.memory_by_gpu[0] == {
        "rollout": (0, int(0.6 * 80 * GIB)),
        "policy": (memory.total, 0),
        "sync": (memory.parameters, engine.parameters),
        "read": (memory.parameters + memory.optimizer, 0),
    }
    assert plan.peaks[0] == max(
        (("rollout", 0, engine.reserved), ("policy", memory.total, 0)), key=lambda x: x[1] + x[2]
    )
    text = "\n".join(lines(plan))
    assert "8 GPUs of 80.00 GiB, colocated: rank r on GPU r, workers from GPU 0 on; 8 GPUs" in text


def test_what_a_host_needs(models: Path) -> None:
    """Seven billion parameters: 12 bytes each of the optimizer, 2 of the parameters and of the
    engines. Only what replicas hold twice, and rounding, is above that."""
    plan = plan_run(flagship(models), device="cuda")
    (host,) = plan.hosts
    n = plan.n_parameters
    assert host.written == pytest.approx(14 * n, rel=1e-3)
    assert host.asleep == pytest.approx(2 * 4 * n, rel=1e-3), "four engines"
    assert 12 * n + 2 * 2 * n < host.offloaded < 12 * n + 2 * 2 * n + 16 * GIB // 2
    assert host.read == 8 * 2 * 4 * 152064 // 2 * 3584, "the embedding, or the head, and another"
    assert host.states["training"] == host.offloaded + host.asleep
    assert host.states["saving"] == host.states["training"] + host.written
    small = Machine(host_gib=host.states["saving"] / GIB - 1)
    (found,) = problems(plan_run(flagship(models), device="cuda", machine=small))
    assert found.startswith("host 0 needs 276") and "while saving" in found
    never = flagship(models, "checkpoint.save_freq=0")
    assert problems(plan_run(never, device="cuda", machine=small)) == []


def test_hosts_of_disaggregated_ranks(models: Path) -> None:
    """Ranks write what they hold, and nothing else is in host memory; every replica but the
    first leaves the parameters to it."""
    config = flagship(
        models, "trainer.placement=disaggregated", "policy.pipeline_model_parallel_size=1"
    )
    plan = plan_run(config, device="cuda", machine=Machine(gpus=2))
    n, ranks = plan.n_parameters, plan.hosts[:2]
    assert [host.written for host in ranks] == [pytest.approx(x * n, rel=1e-3) for x in (8, 6)]
    assert [host.states["training"] for host in plan.hosts] == [0] * 6
    assert [host.states["saving"] for host in plan.hosts[2:]] == [0] * 4


def test_replicas_without_a_distributed_optimizer_leave_all_to_the_first(models: Path) -> None:
    config = flagship(
        models, "trainer.placement=disaggregated", "policy.use_distributed_optimizer=false"
    )
    plan = plan_run(config, device="cuda", machine=Machine(gpus=2))
    n = plan.n_parameters
    assert [h.written for h in plan.hosts[:4]] == [
        pytest.approx(x * n, rel=2e-2) for x in (7, 0, 7, 0)
    ]


def test_experts_have_fewer_replicas(models: Path) -> None:
    """With eight expert-parallel ranks each expert is on one: its state is not shared out."""
    config = flagship(models, *THIRTY_B, f"model.path={models / 'qwen3-30b-a3b'}")
    plan = plan_run(config, device="cuda")
    assert plan.n_parameters == 30_532_122_624
    for stage in plan.stages:
        n_dense = stage.n_parameters - stage.n_in_experts
        assert stage.n_in_experts == 24 * 16 * 3 * 768 * 2048
        assert stage.memory.optimizer == 12 * n_dense // 8 + 12 * stage.n_in_experts
    assert sum(h.written for h in plan.hosts) == pytest.approx(14 * plan.n_parameters, rel=1e-3)


THIRTY_B = (
    "policy.tensor_model_parallel_size=1", "policy.data_parallel_size=8",
    "policy.expert_model_parallel_size=8", "policy.recompute=layers",
    "rollout.tensor_model_parallel_size=4",
)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "model", "overrides", "n_hosts"),
    [
        ("qwen2-7b_math_megatron", "qwen2-7b", (), 1),
        ("qwen3-8b_math_megatron", "qwen3-8b", (), 1),
        ("qwen2-7b_math_megatron", "qwen3-30b-a3b", THIRTY_B, 2),
    ],
)
def test_hosts_of_eight_gpus_of_80_gib_with_2_tib_hold_them(
    models: Path, name: str, model: str, overrides: tuple[str, ...], n_hosts: int
) -> None:
    given = [f"model.path={models / model}", *overrides]
    plan = plan_run(load_config(ROOT / f"configs/{name}.yaml", given), device="cuda")
    assert problems(plan) == [] and len(plan.hosts) == n_hosts
    saving = max(host.states["saving"] for host in plan.hosts)
    assert plan.config.checkpoint.save_freq and saving < 2048 * GIB


def test_disaggregated_gpus_hold_one_or_the_other(models: Path) -> None:
    plan = plan_run(flagship(models, "trainer.placement=disaggregated"), device="cuda")
    assert plan.engine_gpus == range(8, 16)
    by_gpu = plan.memory_by_gpu
    assert [by_gpu[gpu] for gpu in (0, 4, 8, 15)] == [
        {"always": (plan.stages[0].memory.total, 0)},
        {"always": (plan.stages[1].memory.total, 0)},
        {"always": (0, plan.engine.reserved)},
        {"always": (0, plan.engine.reserved)},
    ]
    text = "\n".join(lines(plan))
    assert "16 GPUs of 80.00 GiB, disaggregated: rank r on GPU r, workers from GPU 8 on; 0" in text
    assert "by state" not in text
    (found,) = problems(replace(plan, device_bytes=44 * GIB))
    # The four ranks of the first stage, and all workers.
    assert found.startswith("12 of 16 GPUs are too small; worst is GPU 8: policy 0.00 GiB + engine")


def test_a_72b_model_on_32_gpus(models: Path) -> None:
    config = flagship(
        models,
        f"model.path={models / 'qwen2.5-72b'}",
        "policy.tensor_model_parallel_size=8",
        "policy.pipeline_model_parallel_size=4",
        "policy.data_parallel_size=1",
        "rollout.tensor_model_parallel_size=8",
    )
    plan = plan_run(config, device="cuda")
    assert plan.n_parameters == 72_706_203_648
    assert len(plan.memory_by_gpu) == 32
    assert all(
        states["policy"][0] and states["rollout"][1] for states in plan.memory_by_gpu.values()
    )


def test_the_shipped_72b_layout_fits(models: Path) -> None:
    config = load_config(
        ROOT / "configs/qwen2.5-72b_math_megatron.yaml", [f"model.path={models / 'qwen2.5-72b'}"]
    )
    plan = plan_run(config, device="cuda")
    assert plan.n_parameters == 72_706_203_648
    assert problems(plan) == []
    assert len(plan.memory_by_gpu) == 64 and plan.engine_gpus == range(32, 64)
    # A stage of a quarter of the model on each of the first hosts: 14 bytes a parameter.
    assert [host.written for host in plan.hosts[:4]] == [
        pytest.approx(14 * plan.n_parameters / 4, rel=5e-2)
    ] * 4
    assert plan.publish.sent == plan.publish.bound


def test_what_does_not_fit_is_named(models: Path) -> None:
    kept = flagship(models, "policy.recompute=none")
    (found,) = problems(plan_run(kept, device="cuda", machine=Machine(gpu_gib=24)))
    assert found.startswith("8 of 8 GPUs are too small; worst is GPU 0 in state policy: policy ")
    assert "+ engine 0.00 GiB of 24.00 GiB" in found
    tight = plan_run(flagship(models, "rollout.gpu_memory_utilization=0.01"), device="cuda")
    assert problems(tight)[0].startswith("engine: the weights take 7.09 GiB of the 0.80 GiB")
    least = tight.engine.parameters + 2047 * tight.engine.kv_bytes_per_token
    share = least / (80 * GIB)
    short = plan_run(flagship(models, f"rollout.gpu_memory_utilization={share}"), device="cuda")
    assert "one sequence may have 2,048" in problems(short)[0]
    with pytest.raises(UserError, match="one sequence may have 2,048"):
        fitting_limits(  # what a run asks before its engines start
            short.config,
            short.shape,
            n_parameters=short.engine.parameters // 2,
            device_bytes=short.device_bytes,
        )
    host = replace(plan_run(flagship(models), device="cpu"), host_bytes=GIB)
    assert "are more than this machine's 1.00 GiB" in problems(host)[0]


@pytest.mark.parametrize(("gpu_gib", "chosen"), [(80, "none"), (34, "layers"), (10, "layers")])
def test_layers_are_computed_again_where_nothing_else_fits(
    models: Path, gpu_gib: float, chosen: str
) -> None:
    """33.8 GiB without, 25.0 with: 0.9 of 34 GiB is between them."""
    open_config = flagship(models, "policy.recompute=auto")
    plan = plan_run(open_config, device="cuda", machine=Machine(gpu_gib=gpu_gib))
    assert plan.config.policy.recompute == chosen
    for said in ("none", "attention", "layers"):
        config = flagship(models, f"policy.recompute={said}")
        fixed = plan_run(config, device="cuda", machine=Machine(gpu_gib=gpu_gib))
        assert fixed.config.policy.recompute == said


def test_a_row_is_as_long_as_the_device_gains_from(models: Path) -> None:
    config = flagship(models, "policy.max_tokens_per_micro_batch=null")
    assert plan_run(config, device="cuda").config.policy.row_tokens == 16384
    assert plan_run(config, device="cpu").config.policy.row_tokens == 768
    given = flagship(models, "policy.max_tokens_per_micro_batch=3000")
    assert plan_run(given, device="cpu").config.policy.row_tokens == 3000


@pytest.mark.parametrize("case", LARGE[:2], ids=lambda case: case.name)
def test_the_forecast_of_a_publish(case: LargeCase) -> None:
    links = Links(
        transport="auto",
        ranks=(Seat(host=""),) * case.grid.world_size,
        workers=(Seat(host=""),) * (case.n_engines * case.engine.tp_size),
        n_workers=case.engine.tp_size,
    )
    found = forecast(case.grid, case.engine, links)
    assert found.by_way == {(Distance.HOST, "shm"): found.sent}
    # These vocabularies are multiples of 64 * TP, so that the engines have no padding.
    workers = [worker_elements(case.engine, worker) for worker in range(case.engine.tp_size)]
    assert found.sent == found.bound == case.n_engines * sum(workers)
    assert found.received == max(workers)
    assert found.share <= found.most_sent <= 1.15 * found.share


def test_rows_are_counted_without_a_tokenizer(tmp_path: Path) -> None:
    row = make_row(data_source="d", content="c", ability="a", ground_truth="1", extra_info={"i": 0})
    write_parquets({tmp_path / "a.parquet": [row] * 5})
    jsonl = write_problems(tmp_path / "b.jsonl", ["1", "2"])
    jsonl.write_text(jsonl.read_text() + "\n")
    assert count_rows([str(tmp_path / "a.parquet"), str(jsonl)]) == 7
    (tmp_path / "c.parquet").write_text("not parquet")
    for unknown in ("c.parquet", "missing.parquet", "d.txt"):
        assert count_rows([str(jsonl), str(tmp_path / unknown)]) is None


def test_epochs(models: Path, tmp_path: Path) -> None:
    file = write_problems(tmp_path / "b.jsonl", ["1"] * 32)
    config = flagship(
        models, f"data.train_files=[{file}]", "trainer.train_batch_size=16",
        "trainer.mini_batch_size=8", "trainer.total_training_steps=3",
    )  # fmt: skip
    text = "\n".join(lines(plan_run(config, device="cuda")))
    assert "32 prompts = 2.00 rollout batches = 4.00 updates; the run is 1.50 epochs" in text


def test_the_command_needs_neither_weights_nor_torchrun(models: Path) -> None:
    command = [
        sys.executable, "-m", "gpg_megatron.start.train", "--dry-run", "--gpu-memory-gb", "80",
        "--config", "configs/qwen2-7b_math_megatron.yaml", f"model.path={models / 'qwen2-7b'}",
        "trainer.device=cuda",
    ]  # fmt: skip
    # Another test's run would have said warnings already.
    own = {key: value for key, value in os.environ.items() if key != RUN_ID_VARIABLE}
    done = subprocess.run(command, cwd=ROOT, env=own, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert "off-policy correction: truncate-token" in done.stdout
    assert done.stdout.splitlines()[0].startswith("model      Qwen2ForCausalLM, 7.62e9 parameters")
    assert done.stdout.splitlines()[-1] == "fits       as far as is known"


def test_mistakes_are_one_line(
    models: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(RUN_ID_VARIABLE, raising=False)
    config = str(ROOT / "configs/qwen2-7b_math_megatron.yaml")
    arguments = ["--config", config, "--dry-run"]
    for override, message in (
        (f"model.path={tmp_path}", "has no config.json"),
        ("policy.tensor_model_parallel_size=3", "does not divide the model's 28 attention heads"),
    ):
        given = [*arguments, f"model.path={models / 'qwen2-7b'}", override]
        assert train.main(given) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line


def test_a_layout_that_does_not_fit_the_model(models: Path) -> None:
    config = flagship(models, "policy.pipeline_model_parallel_size=29")
    with pytest.raises(UserError, match="does not fit the model's 28 layers"):
        plan_run(config, device="cuda")
