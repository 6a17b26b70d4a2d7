"""The whole job, as a user starts it: gpg-train with real ranks, real vLLM, real transfers."""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from gpg_megatron.checkpoint.compare import compare
from gpg_megatron.config.loading import load_config
from gpg_megatron.errors import EXIT_STOPPED
from gpg_megatron.start.dry_run import plan_run
from tests.engine_processes import engine_processes
from tests.stack.jobs import START_LIMIT_S, STEP_KEYS, Job, running_job
from tests.tiny import Family, make_tiny_model, write_problems

PROMPTS = [f"{a}+{b}=" for a in range(6) for b in range(6)]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_job(tmp_path_factory.mktemp("job"))


def make_job(
    folder: Path, *, family: Family = "qwen2", tied: bool = True, dtype: str = "fp32"
) -> Path:
    """A folder with a model, problems that it answers now and then, and config.yaml."""
    model = make_tiny_model(folder / "model", num_layers=4, sharpness=6.0, family=family, tied=tied)
    answers = _likely_answers(model)
    write_problems(folder / "train.jsonl", PROMPTS, answers=answers)
    write_problems(folder / "test.jsonl", PROMPTS[::4], answers=answers[::4])
    config = {
        "data": {
            "train_files": [str(folder / "train.jsonl")],
            "val_files": [str(folder / "test.jsonl")],
            "apply_chat_template": False,
            "max_prompt_length": 8,
        },
        "model": {"path": str(folder / "model"), "dtype": dtype},
        "policy": {"tensor_model_parallel_size": 2, "lr": 1e-4, "max_tokens_per_micro_batch": 64},
        "rollout": {
            "n": 8,
            "max_response_length": 1,
            "dtype": dtype,
            "kv_cache_gb": 0.125,
            "enforce_eager": True,
        },
        "trainer": {"train_batch_size": 8, "device": "cpu", "total_training_steps": 100_000},
    }
    (folder / "config.yaml").write_text(json.dumps(config))
    return folder


def _likely_answers(model: Path) -> list[str]:
    """The model's most likely next token that is not white space, for each prompt."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    network = AutoModelForCausalLM.from_pretrained(model)
    answers = []
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer.encode(prompt, add_special_tokens=False)])
        ranked = network(ids).logits[0, -1].argsort(descending=True).tolist()
        texts = (tokenizer.decode([token]) for token in ranked)
        answers.append(next(t for t in texts if t.strip() == t and t.isascii() and t))
    return answers


@contextmanager
def started(folder: Path, name: str, *overrides: str) -> Iterator[Job]:
    """gpg-train with the folder's configuration; its run directory has the given name."""
    output = folder / name
    command = [sys.executable, "-m", "gpg_megatron.start.train", "--config"]
    command += [str(folder / "config.yaml"), f"trainer.output_dir={output}", *overrides]
    with running_job(command, output=output, log=folder / f"{name}.log") as job:
        yield job


def test_tp2_pp2_policy_with_a_tp2_engine(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interleaved stages, and other tensor-parallel layouts on both sides; every sync is checked by
    log-probs. No temporary file is left."""
    temporary = Path(tempfile.mkdtemp(dir="/tmp"))  # a short name, for Ray's sockets
    monkeypatch.setenv("TMPDIR", str(temporary))
    overrides = (
        "trainer.total_training_steps=3",
        "policy.pipeline_model_parallel_size=2",
        "policy.virtual_pipeline_model_parallel_size=2",
        "rollout.tensor_model_parallel_size=2",
        "validation.n=8",
    )
    with started(job, "whole", *overrides) as run:
        printed = run.ends(0, limit_s=START_LIMIT_S)
    temporary.rmdir()
    assert "first sync verified" in printed and "step 3/3" in printed, printed
    before, *steps = run.metrics()
    assert [row["step"] for row in steps] == [1, 2, 3]
    assert [row["version"] for row in steps] == [1, 2, 3], "each step made one update"
    for row in steps:
        assert row["mismatch/logprob_max"] <= 1e-4
        assert row["staleness/max"] == 0
        assert 0 < row["throughput/policy_mfu"] < 1
        assert row.keys() >= STEP_KEYS
    key = "eval/arithmetic/tiny/mean@8"
    assert steps[-1][key] > before[key], "three steps on one-token answers must show"
    rows = [json.loads(line) for line in (run.output / "rollouts/step_2.jsonl").open()]
    assert {row["version"] for row in rows} == {1}
    assert (run.output / "report.html").stat().st_size > 10_000
    assert any((run.output / "tensorboard").iterdir())
    config = load_config(run.output / "config.yaml")
    assert config.trainer.total_training_steps == 3
    for part, n_bytes in plan_run(config, device="cpu").cpu_parts.items():
        assert steps[-1][f"memory/{part}_gb"] == pytest.approx(n_bytes / 1e9, rel=0.15), part


@pytest.mark.slow
def test_colocated_learns_what_disaggregated_learns(job: Path) -> None:
    """Every hand-over between real ranks and a real engine, a save and a resume included; on CPU
    the engine keeps its memory, the policy really gives its own back."""
    overrides = (
        "policy.data_parallel_size=2",
        "policy.use_distributed_optimizer=true",
        "policy.tensor_model_parallel_size=1",
        "trainer.total_training_steps=3",
        "trainer.test_freq=2",
        "checkpoint.save_freq=1",
    )
    with started(job, "disaggregated", *overrides) as run:
        assert "placement" not in run.ends(0, limit_s=START_LIMIT_S)
        expected = run.metrics()
    colocated = (*overrides, "trainer.placement=colocated")
    with started(job, "colocated", *colocated, "trainer.total_training_steps=2") as run:
        printed = run.ends(0, limit_s=START_LIMIT_S)
    assert "warning: trainer.placement=colocated saves no memory on CPU" in printed
    with started(job, "colocated", *colocated) as run:
        assert "resumed from" in run.ends(0, limit_s=START_LIMIT_S)
        found = run.metrics()
    assert [row["step"] for row in found] == [row["step"] for row in expected] == [0, 1, 2, 3]
    same = ("version", "reward/mean", "eval/arithmetic/tiny/mean@1", "policy/tokens")
    for row, right in zip(found[1:], expected[1:], strict=True):
        assert {key: row.get(key) for key in same} == {key: right.get(key) for key in same}
        assert row["policy/loss"] == pytest.approx(right["policy/loss"], rel=1e-4, abs=1e-7)
        assert row["mismatch/logprob_max"] <= 1e-4
        assert row["timing/placement_s"] > 0 and "timing/placement_s" not in right


def test_redraws_carry_groups_over_and_several_updates_are_corrected(job: Path) -> None:
    """More live groups are drawn than a batch holds; the next step learns from them."""
    overrides = (
        "trainer.total_training_steps=4",
        "trainer.mini_batch_size=4",
        "policy.lr=1e-6",  # so small that no second update is held
        "algorithm.beta_th=1.0",
        "algorithm.max_redraws=8",
        "validation.before_train=false",
    )
    with started(job, "redrawn", *overrides) as run:
        printed = run.ends(0, limit_s=START_LIMIT_S)
    assert "warning" not in printed
    assert "truncate-token against the engines' log-probs, no update beyond 0.05 nats (" in printed
    assert "(2 updates for each rollout batch" in printed
    steps = [row for row in run.metrics() if row["step"]]
    before = [{"group/carried_out": 0}, *steps]
    for last, row in zip(before, steps, strict=False):
        assert row["group/carried_in"] == last["group/carried_out"]
        assert row["group/drawn"] == 8 - row["group/carried_in"] + 8 * row["group/redraws"]
        assert row["group/redraws_exhausted"] == 0
        assert row["staleness/max"] == (2 if row["group/carried_in"] else 0), "two updates a step"
        assert row["policy/updates_held"] == 0
        assert row["staleness/fraction"] <= row["group/carried_in"] / 8
        assert 0.0 < row["correction/ess"] <= 1.0 + 1e-6
    assert sum(row["group/redraws"] for row in steps) > 0, "not every group is live"
    assert sum(row["group/carried_in"] for row in steps) > 0
    assert [row["version"] for row in steps] == [2, 4, 6, 8]


def test_grpo_with_old_log_probs_a_reference_and_an_entropy_bonus(job: Path) -> None:
    overrides = (
        "trainer.total_training_steps=3",
        "trainer.mini_batch_size=4",
        "policy.lr=1e-6",  # so small that a divergence grows with the square of the steps
        "algorithm.preset=grpo",
        "algorithm.kl_coef=0.01",
        "algorithm.entropy_coef=0.01",
        "validation.before_train=false",
    )
    with started(job, "grpo", *overrides) as run:
        run.ends(0, limit_s=START_LIMIT_S)
    steps = [row for row in run.metrics() if row["step"]]
    for row in steps:
        assert row["mismatch/logprob_max"] <= 1e-4, "the reference went back to its place"
        assert row["policy/tokens_skipped"] == 0, "every sample has a gradient"
        assert 0.0 <= row["policy/clip_fraction"] <= 1.0
        assert row["policy/entropy"] > 0.0
    assert 0.0 < steps[0]["policy/kl"] < steps[-1]["policy/kl"], "it moves away from the reference"
    assert load_config(run.output / "config.yaml").algorithm.f_norm == "std"


def test_a_run_that_may_not_redraw_any_more_ends(job: Path) -> None:
    """Each prompt once, at a temperature at which all of its answers are alike."""
    overrides = ("algorithm.preset=amap", "algorithm.max_redraws=1", "rollout.temperature=0.01")
    with started(job, "exhausted", *overrides, "bridge.canary_tolerance=100") as run:
        printed = run.ends(1, limit_s=START_LIMIT_S)
    assert "error: after 1 redraws 0 groups are live of the 4 that a batch needs" in printed


def test_an_engine_that_is_killed_is_replaced_and_nothing_shows(job: Path) -> None:
    """A run with a killed engine and one without. A killed rank ends one, Ctrl-C the other."""
    rows = []
    for is_killed in (False, True):
        with started(job, f"killed_{is_killed}") as run:
            run.wait_for_step(1)
            assert run.is_running()
            if is_killed:
                engine_processes(run.process.pid)[0].kill()
                run.wait_for_step(run.metrics()[-1]["step"] + 3)
                os.killpg(run.process.pid, signal.SIGINT)
                printed = run.ends(130)
                assert "engine 0 died while" in printed and "; it is replaced" in printed
                assert "engine 0 is there again" in printed
                assert printed.splitlines()[-1] == "stopped by SIGINT"
            else:
                run.wait_for_step(8)
                run.ranks()[1].kill()
                assert "policy rank 1 ended: killed by SIGKILL" in run.ends(1)
            rows.append([_timeless(row) for row in run.metrics()])
    n = min(map(len, rows))
    assert n >= 5 and rows[0][:n] == rows[1][:n]


EXPORT = "checkpoint.hf_export=last"
SAVING = (
    "policy.pipeline_model_parallel_size=2",
    "checkpoint.save_freq=2",
    "trainer.test_freq=2",
    "logging.rollout_samples=64",
)


@pytest.mark.timeout(1200)
def test_a_resumed_run_is_the_uninterrupted_one(job: Path) -> None:
    """Rollouts, metrics and stored weights, bit by bit; and its checkpoint and its export are
    models to start from."""
    with started(job, "cut", *SAVING) as cut:
        cut.wait_for_step(1)
        cut.process.send_signal(signal.SIGTERM)
        printed = cut.ends(EXIT_STOPPED, limit_s=60)
    done = cut.metrics()[-1]["step"]
    assert "left in order: asked by SIGTERM; started again" in printed
    assert (cut.output / "checkpoints" / f"step_{done}" / "complete.json").exists(), "in any step"
    last_step = f"trainer.total_training_steps={done + 2}"
    with started(job, "whole_saving", *SAVING, last_step, EXPORT) as whole:
        whole.ends(0, limit_s=START_LIMIT_S)
    (cut.output / "checkpoints" / f"step_{done + 1}").mkdir()  # what a kill leaves
    with started(job, "cut", *SAVING, last_step) as cut:
        printed = cut.ends(0, limit_s=START_LIMIT_S)
    assert f"step_{done + 1} is incomplete" in printed and "resumed from" in printed, printed
    for step in (done + 1, done + 2):
        name = f"rollouts/step_{step}.jsonl"
        assert (whole.output / name).read_bytes() == (cut.output / name).read_bytes()
    last = {row["step"]: row for row in cut.metrics()}
    for row in whole.metrics():
        assert _timeless(last[row["step"]]) == _timeless(row)
    ends = [run.output / "checkpoints" / f"step_{done + 2}" for run in (whole, cut)]
    for path in ends[0].glob("*.distcp"):
        assert path.read_bytes() == (ends[1] / path.name).read_bytes(), path.name

    result = compare(whole.output / "hf" / f"step_{done + 2}", ends[0])
    assert len(result) > 40 and all(result.values())
    again = "trainer.total_training_steps=1"
    with started(job, "from_checkpoint", f"model.path={ends[0]}", again) as run:
        assert "first sync verified" in run.ends(0, limit_s=START_LIMIT_S)
    with started(job, "cut", *SAVING, last_step) as run:
        assert "nothing to do" in run.ends(0, limit_s=START_LIMIT_S)


def _timeless(row: dict[str, Any]) -> dict[str, Any]:
    """The metrics that do not depend on the clock or the machine."""
    return {k: v for k, v in row.items() if not k.startswith(("timing/", "throughput/", "memory/"))}


AHEAD = (
    "trainer.max_staleness=1",
    "algorithm.correction=truncate-token",
    "algorithm.beta_th=1.0",
    "algorithm.max_redraws=8",
    "checkpoint.save_freq=2",
    "logging.rollout_samples=64",
    "trainer.total_training_steps=5",
    "validation.before_train=false",
)


@pytest.mark.slow
def test_a_killed_run_that_draws_ahead_goes_on_as_if_nothing_had_happened(job: Path) -> None:
    """It starts again by itself. What was drawn and not trained on, and what was carried over, is
    in the checkpoint."""
    with started(job, "whole_ahead", *AHEAD) as whole:
        printed = whole.ends(0, limit_s=START_LIMIT_S)
    assert "warning" not in printed, "the correction answers it"
    steps = whole.metrics()
    first, *later = (row["staleness/max"] for row in steps)
    assert first == 0 and all(1 <= n <= 2 for n in later), "a carried group is one step older"
    assert all(row["timing/wait_s"] >= 0 for row in steps)
    assert sum(row["group/carried_in"] for row in steps) > 0

    with started(job, "cut_ahead", *AHEAD, "trainer.max_restarts=1") as cut:
        marker = cut.output / "checkpoints" / "step_2" / "complete.json"
        deadline = time.monotonic() + START_LIMIT_S
        while not marker.exists():
            assert cut.is_running() and time.monotonic() < deadline, cut.log.read_text()
            time.sleep(0.01)
        cut.ranks()[1].kill()
        printed = cut.ends(0, limit_s=START_LIMIT_S)
    assert "restart 1 of 1, from step 2: policy rank 1 ended: killed by SIGKILL" in printed
    assert "resumed from" in printed
    last = {row["step"]: row for row in cut.metrics()}
    for row in steps:
        assert _timeless(last[row["step"]]) == _timeless(row)
    for step in range(3, 6):
        name = f"rollouts/step_{step}.jsonl"
        assert (whole.output / name).read_bytes() == (cut.output / name).read_bytes()
    ends = [run.output / "checkpoints" / "step_5" for run in (whole, cut)]
    for path in ends[0].glob("*.distcp"):
        assert path.read_bytes() == (ends[1] / path.name).read_bytes(), path.name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "dtype", "replay"),
    # On a CPU the engine has gated delta nets in bf16 only.
    [
        ("glm4_moe", "fp32", False),
        ("deepseek_v2", "fp32", True),
        ("deepseek_v3", "fp32", False),
        ("qwen3_next", "bf16", False),
    ],
)
def test_a_family_trains_and_goes_on_after_a_save(
    tmp_path: Path, family: Family, dtype: str, replay: bool
) -> None:
    """Two steps without a break, and the second again from what the first has saved; with the
    engine's experts, the engine says all of them."""
    job = make_job(tmp_path, family=family, tied=False, dtype=dtype)
    two = (
        "trainer.total_training_steps=2",
        "checkpoint.save_freq=1",
        f"rollout.router_replay={str(replay).lower()}",
    )
    with started(job, "whole", *two) as run:
        run.ends(0, limit_s=START_LIMIT_S)
        _, *whole = run.metrics()
    assert [row["step"] for row in whole] == [1, 2]
    assert all(row["policy/grad_norm"] > 0 for row in whole)
    assert [row.get("policy/routing_missing") for row in whole] == [0.0 if replay else None] * 2
    middle = run.output / "checkpoints" / "step_1"
    with started(job, "second", *two, f"checkpoint.resume={middle}") as run:
        run.ends(0, limit_s=START_LIMIT_S)
    (second,) = run.metrics()
    assert _timeless(second) == _timeless(whole[1])


@pytest.mark.slow
def test_under_a_torchrun_of_the_users(job: Path) -> None:
    """Rank 0 has a Ray of its own, and nothing is left when torchrun is killed."""
    output = job / "torchrun"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "gpg_megatron.start.train", "--config", str(job / "config.yaml")]
    command += [f"trainer.output_dir={output}"]
    with running_job(command, output=output, log=job / "torchrun.log") as run:
        run.wait_for_step(1)
        assert run.is_running() and run.ranks().keys() == {0, 1}
        run.process.kill()
        run.ends(-signal.SIGKILL)
