"""Whatever a user brings: it is taken, or one line says why not."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from gpg_megatron.config.loading import load_config
from gpg_megatron.config.sections import Config, DataConfig
from gpg_megatron.data.prompts import load_prompts
from gpg_megatron.data.schema import make_row, parse_row
from gpg_megatron.data.tokenizer import load_tokenizer
from gpg_megatron.errors import exit_codes
from tests.tiny import CHAT_TEMPLATE, _byte_tokenizer

SAME_FOLDER = [HealthCheck.function_scoped_fixture]
TEXT = st.text(max_size=12) | st.text(st.characters(categories=["Cs", "Cc", "Zs"]), max_size=3)
SCALAR = st.none() | st.booleans() | st.integers() | st.floats() | TEXT
JSON = st.recursive(
    SCALAR, lambda x: st.lists(x, max_size=3) | st.dictionaries(TEXT, x, max_size=3), max_leaves=6
)
ROW = make_row(data_source="d", content="1+1=", ability="a", ground_truth="2", extra_info={"i": 0})
KEYS = [
    f"{section.name}.{key.name}"
    for section in dataclasses.fields(Config)
    for key in dataclasses.fields(getattr(Config(), section.name))
]


def taken(use: Callable[[], object]) -> bool:
    """Whether an input was taken; if not, a command would print one line."""

    @exit_codes
    def command(argv: Sequence[str] | None = None) -> int:
        use()
        return 0

    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        code = command()
    if code:
        line = said.getvalue().removesuffix("\n")
        assert line.startswith("error: ") and line.isprintable() and len(line) > 12, line
    return code == 0


def paths(value: Any) -> Iterator[tuple[Any, ...]]:
    """To every part of a JSON value, itself included."""
    yield ()
    items: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    for key, part in items:
        for path in paths(part):
            yield key, *path


def replaced(value: Any, path: tuple[Any, ...], part: Any) -> Any:
    """A JSON value with another part."""
    if not path:
        return part
    first, *rest = path
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[first] = replaced(value[first], tuple(rest), part)
    return copy


@settings(max_examples=500)
@given(JSON | st.builds(replaced, st.just(ROW), st.sampled_from([*paths(ROW)]), JSON))
@example(replaced(ROW, ("reward_model", "ground_truth"), 10**5000))
@example(replaced(ROW, ("reward_model", "ground_truth"), 1e300))
def test_any_row(row: Any) -> None:
    if taken(lambda: parse_row(row, "a.jsonl:1")):
        problem = parse_row(row, "a.jsonl:1")
        (problem.ground_truth + problem.data_source + str(problem.messages)).encode()


LINES = st.binary(max_size=40) | JSON.map(lambda x: json.dumps(x).encode())


@settings(max_examples=100, suppress_health_check=SAME_FOLDER)
@given(st.lists(LINES | st.just(json.dumps(ROW).encode()), max_size=3).map(b"\n".join))
def test_any_file_of_rows(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    data = DataConfig(apply_chat_template=False)
    taken(lambda: load_prompts([str(path)], data, _byte_tokenizer(), 320))


@settings(max_examples=150)
@given(st.sampled_from(KEYS), TEXT | JSON.map(json.dumps) | st.text("[]{}:,'\"$\\#&*!|>%@-0e. "))
@example("policy.lr", "9" * 5000)
@example("trainer.seed", "1" + "0" * 400)
@example("rollout.n", "[" * 5000)
@example("data.chat_template_kwargs", "{a: {b: [1, {c: ${d}}]}}")
@example("reward.weights", "{answer: 1e999}")
def test_any_override(key: str, value: str) -> None:
    taken(lambda: load_config(None, ["model.path=m", "data.train_files=[f]", f"{key}={value}"]))


@settings(max_examples=100, suppress_health_check=SAME_FOLDER)
@given(st.binary(max_size=60) | st.text("adtrin_policy.lsed: \n-[]{}1e'\"&*!").map(str.encode))
@example(b"[" * 5000)
@example(b"policy: {lr: " + b"9" * 5000 + b"}")
@example(b"&a [*a]")
def test_any_configuration_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    taken(lambda: load_config(path, ["model.path=m", "data.train_files=[f]"]))


@pytest.fixture(scope="module")
def tokenizer_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """File -> its JSON."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = _byte_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").unlink()
    content = {x.name: json.loads(x.read_text()) for x in folder.glob("tokenizer*.json")}
    content["tokenizer_config.json"]["chat_template"] = CHAT_TEMPLATE
    return content


def rendered(folder: Path, file: Path) -> None:
    load_prompts([str(file)], DataConfig(), load_tokenizer(folder), 320)


@settings(max_examples=100, suppress_health_check=SAME_FOLDER)
@given(st.data())
def test_any_tokenizer(
    tmp_path: Path, tokenizer_files: dict[str, Any], data: st.DataObject
) -> None:
    """One part of one file is something else, or the file is cut off or no JSON at all."""
    name = data.draw(st.sampled_from([*tokenizer_files]))
    places = [p for p in paths(tokenizer_files[name]) if "vocab" not in p[:-1]]
    for file, content in tokenizer_files.items():
        text = json.dumps(content)
        if file == name:
            how = data.draw(st.sampled_from(["changed", "cut", "noise"]))
            if how == "changed":
                place = data.draw(st.sampled_from(places))
                text = json.dumps(replaced(content, place, data.draw(JSON)))
            elif how == "cut":
                text = text[: data.draw(st.integers(0, len(text)))]
            else:
                text = data.draw(TEXT)
        (tmp_path / file).write_bytes(text.encode("utf-8", "surrogatepass"))
    rows = tmp_path / "a.jsonl"
    rows.write_text(json.dumps(ROW) + "\n")
    taken(lambda: rendered(tmp_path, rows))
