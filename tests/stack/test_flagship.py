"""The flagship's scripts for real: two steps on GSM8K and MATH with a small Qwen2, on CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gpg_megatron.config.loading import load_config
from tests.stack import flagship
from tests.stack.jobs import START_LIMIT_S, Job, running_job
from tests.tiny import make_answering_model

# Script -> the policy's TP and PP.
SCRIPTS = {"run_qwen2-7b_math_megatron.sh": (2, 2), "run_qwen2-7b_math.sh": (1, 1)}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, development_data: Path) -> dict[str, Job]:
    """Each script has come to its end; its last lines are printed."""
    folder = tmp_path_factory.mktemp("flagship")
    model = make_answering_model(folder / "model")
    raw = flagship.write_raw_data(development_data, folder / "raw")
    done = {}
    for script in SCRIPTS:
        output, log = folder / script, folder / f"{script}.log"
        environment = flagship.environment(model, raw, folder, output)
        command: list[str | Path] = [flagship.ROOT / "launch" / script, *flagship.OVERRIDES]
        with running_job(command, output=output, log=log, environment=environment) as job:
            print(job.ends(0, limit_s=START_LIMIT_S))
        done[script] = job
    return done


@pytest.mark.parametrize("script", SCRIPTS)
def test_two_steps(runs: dict[str, Job], script: str) -> None:
    job = runs[script]
    printed = job.log.read_text()
    assert "first sync verified" in printed and "step 2/2" in printed
    flagship.check_metrics(job.metrics())
    policy = load_config(job.output / "config.yaml").policy
    layout = (policy.tensor_model_parallel_size, policy.pipeline_model_parallel_size)
    assert layout == SCRIPTS[script]
    rows = [json.loads(line) for line in (job.output / "rollouts/step_2.jsonl").open()]
    assert len({row["prompt_id"].partition("/train")[0] for row in rows}) == 2, "both data sets"
    saved = job.output / "checkpoints/step_2/complete.json"
    assert saved.is_file(), "as checkpoint.save_freq says"


def test_both_scripts_compute_the_same_first_step(runs: dict[str, Job]) -> None:
    """The engine and the samples are the same; the policy's layout must not show."""
    first, second = (job.metrics()[1] for job in runs.values())
    for key in ("reward/mean", "group/alpha", "response/tokens", "policy/loss", "policy/grad_norm"):
        assert first[key] == pytest.approx(second[key], rel=1e-4), key
