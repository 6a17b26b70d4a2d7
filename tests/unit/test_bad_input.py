"""gpg-train refuses what cannot work: one line, exit code 2, before anything is started."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gpg_megatron.host.reaper import RUN_ID_VARIABLE
from gpg_megatron.start import train
from tests.tiny import make_tiny_model, write_problems


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"), num_layers=4)


@pytest.fixture
def config(tmp_path: Path, model: Path) -> Path:
    data = write_problems(tmp_path / "train.jsonl", ["1+1=", "2+2="])
    text = {
        "data": {
            "train_files": [str(data)],
            "apply_chat_template": False,
            "max_prompt_length": 16,
        },
        "model": {"path": str(model)},
        "rollout": {"max_response_length": 4},
        "trainer": {"output_dir": str(tmp_path / "run"), "device": "cpu"},
    }
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(text))
    return path


def refusal(config: Path, capsys: pytest.CaptureFixture[str], *overrides: str) -> str:
    """The one line that gpg-train prints."""
    assert train.main(["--config", str(config), *overrides]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("error: "), err
    assert not (config.parent / "run").exists(), "something was written"
    return err


@pytest.fixture(autouse=True)
def no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def started(*_: object) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr("gpg_megatron.start.world.start_reaper", started)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.path=nowhere"], ["model.path", "no such directory", "nowhere"]),
        (["policy.lrr=1e-6"], ["policy.lrr", "policy.lr"]),
        (
            ["policy.tensor_model_parallel_size=3"],
            ["policy.tensor_model_parallel_size=3", "4 attention heads", "[1, 2, 4]"],
        ),
        (
            ["policy.pipeline_model_parallel_size=5"],
            ["policy.pipeline_model_parallel_size=5", "4 layers", "[1, 1, 1, 1, 0]"],
        ),
        (
            ["policy.virtual_pipeline_model_parallel_size=2"],
            ["policy.virtual_pipeline_model_parallel_size is 2", "expected 1, or more stages"],
        ),
        (
            ["policy.num_layers_in_last_pipeline_stage=4"],
            ["policy.num_layers_in_last_pipeline_stage is 4", "expected null, or more stages"],
        ),
        (
            ["rollout.tensor_model_parallel_size=8"],
            ["rollout.tensor_model_parallel_size=8", "4 attention heads"],
        ),
        (["data.max_prompt_length=3"], ["train.jsonl", "4 tokens", "data.max_prompt_length=3"]),
        (["rollout.max_response_length=5000"], ["max_position_embeddings", "512"]),
        (["data.apply_chat_template=true"], ["no chat template"]),
        (["reward.scorer=gsm9k"], ["reward.scorer", "gsm9k"]),
        (["policy.lr"], ["policy.lr", "a.b=value"]),
    ],
)
def test_a_wrong_value(
    config: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], words: list[str]
) -> None:
    line = refusal(config, capsys, *overrides)
    assert all(word in line for word in words), line


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", ["train.jsonl", "no rows"]),
        ('{"data_source": "arithmetic"\n', ["train.jsonl:1"]),
    ],
)
def test_a_broken_data_file(
    config: Path, capsys: pytest.CaptureFixture[str], content: str, words: list[str]
) -> None:
    (config.parent / "train.jsonl").write_text(content)
    line = refusal(config, capsys)
    assert all(word in line for word in words), line


def test_a_data_source_that_no_scorer_knows(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_problems(config.parent / "train.jsonl", ["1+1="], data_source="riddles")
    assert "riddles" in refusal(config, capsys)


def test_an_uneven_pipeline_is_legal(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """3 stages of 1 + 2 + 1 layers: refused for another reason than the layout."""
    line = refusal(
        config,
        capsys,
        "policy.pipeline_model_parallel_size=3",
        "data.train_files=[missing.jsonl]",
    )
    assert "missing.jsonl" in line


def test_rank_of_a_platform_makes_no_rank(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert train.main(["--config", "none.yaml"]) == 2
    assert "none.yaml" in capsys.readouterr().err


def test_a_missing_config_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["--config", "none.yaml"]) == 2
    assert "none.yaml" in capsys.readouterr().err


def test_a_warning_is_one_line_and_does_not_stop(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpg_megatron.start.launcher.launch", lambda *_: 0)
    monkeypatch.delenv(RUN_ID_VARIABLE, raising=False)
    several = ["trainer.train_batch_size=4", "trainer.mini_batch_size=1"]
    uncorrected = [*several, "algorithm.correction=none"]
    assert train.main(["--config", str(config), *uncorrected]) == 0
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith("warning: algorithm.loss=gpg") and "4 optimizer steps" in err
    assert train.main(["--config", str(config), *several]) == 0
    assert capsys.readouterr().err == ""
