"""a.b=value keeps what was typed where the key is a text; paths are those of the shell."""

from __future__ import annotations

import string
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpg_megatron.config.loading import config_yaml, load_config
from gpg_megatron.config.sections import Config
from gpg_megatron.errors import UserError

NEEDED = ("model.path=m", "data.train_files=[f]")


def loaded(*overrides: str) -> Config:
    return load_config(None, [*NEEDED, *overrides])


@pytest.mark.parametrize(
    "text",
    ["/data/run #1", "001", "12:30", "No", "on", "1e3", "a: b", "[x", "{y}", "${z}", "it's", "-"],
)
def test_a_text_stays_as_it_was_typed(text: str, tmp_path: Path) -> None:
    config = loaded(f"trainer.output_dir={text}", f"data.system_prompt={text}")
    assert (config.trainer.output_dir, config.data.system_prompt) == (text, text)
    (tmp_path / "again.yaml").write_text(config_yaml(config))
    assert load_config(tmp_path / "again.yaml") == config


@pytest.mark.parametrize(
    ("typed", "right"),
    [
        ("[No,12:30, 001]", ("No", "12:30", "001")),
        (r'["\n", "a, b"]', ("\n", "a, b")),
        ("[]", ()),
        ("[ #, it's ]", ("#", "it's")),
    ],
)
def test_so_do_the_texts_of_a_list(typed: str, right: tuple[str, ...]) -> None:
    assert loaded(f"rollout.stop={typed}").rollout.stop == right


UNQUOTED = st.text([x for x in string.printable if x not in "\"',"]).map(str.strip).filter(bool)


@settings(max_examples=25, deadline=None)
@given(st.lists(UNQUOTED))
def test_any_texts_without_quotes_and_commas_are_a_list(items: list[str]) -> None:
    assert loaded(f"rollout.stop=[{','.join(items)}]").rollout.stop == tuple(items)


def test_null_and_nothing_unset_what_may_be_unset() -> None:
    assert loaded("data.system_prompt=null", "rollout.ray_address=").data.system_prompt is None
    assert loaded("logging.wandb_project=null").logging.wandb_project == "null"


def test_other_keys_are_yaml_as_before() -> None:
    config = loaded("policy.lr=1e-5", "trainer.seed=7", "reward.weights={answer: 2}")
    assert (config.policy.lr, config.trainer.seed) == (1e-5, 7)
    assert config.reward.weights["answer"] == 2.0
    with pytest.raises(UserError, match="policy.lr"):
        loaded("policy.lr=fast")


def test_home_and_variables_are_written_out_in_paths_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    config = load_config(
        None, ["model.path=~/m", "data.train_files=[$HOME/a,~/b #1]", "data.system_prompt=~ $HOME"]
    )
    assert config.model.path == f"{tmp_path}/m"
    assert config.data.train_files == (f"{tmp_path}/a", f"{tmp_path}/b #1")
    assert config.data.system_prompt == "~ $HOME"


def test_a_syntax_error_of_a_file_names_its_line(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("policy:\n  lr: 1\n bad: [1,\n")
    with pytest.raises(UserError, match=r"x\.yaml: not a readable YAML file: line 3, column 2: "):
        load_config(tmp_path / "x.yaml")
