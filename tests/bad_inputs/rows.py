"""What rows of data can have wrong, and what the tokenizer makes of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tests.bad_inputs.case import Case, code, edited

GOOD: Mapping[str, Any] = {
    "data_source": "arithmetic/tiny",
    "prompt": [{"role": "user", "content": "1+1="}],
    "reward_model": {"ground_truth": "2"},
}
CHAT = "data.apply_chat_template=true"
TEMPLATE = "model/tokenizer_config.json"


def row(name: str, **changes: Any) -> Case:
    """The second row of train.jsonl is GOOD with these changes."""
    text = json.dumps(dict(GOOD) | changes)
    shown = ", ".join(f"{code(json.dumps({k: v})[1:-1])}" for k, v in changes.items())
    return Case(name=name, brings=shown, files={"train.jsonl": f"{json.dumps(GOOD)}\n{text}\n"})


def line(name: str, text: str, brings: str) -> Case:
    """The second line of train.jsonl."""
    return Case(name=name, brings=brings, files={"train.jsonl": f"{json.dumps(GOOD)}\n{text}\n"})


def truth(name: str, value: Any) -> Case:
    """A ground truth."""
    return row(name, reward_model={"ground_truth": value})


def asks(content: str, role: str = "user") -> dict[str, Any]:
    """The row's prompt."""
    return {"prompt": [{"role": role, "content": content}]}


def template(name: str, text: str, *arguments: str) -> Case:
    """A chat template, and a row with a system message."""
    messages = [{"role": "system", "content": "Be brief."}, *GOOD["prompt"]]
    return Case(
        name=name,
        brings=code(" ".join([text, *arguments])),
        arguments=(CHAT, "data.max_prompt_length=64", *arguments),
        files={
            TEMPLATE: edited(chat_template=text),
            "train.jsonl": json.dumps(dict(GOOD) | {"prompt": messages}) + "\n",
        },
    )


def tokenizer_file(name: str, brings: str, content: str | bytes | None, file: str) -> Case:
    """A file of the tokenizer; None: it is missing."""
    return Case(name=name, brings=brings, files={f"model/{file}": content})


def cut(path: Path) -> None:
    """The first half of a file."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def vocabulary(change: Callable[[dict[str, int]], object]) -> Callable[[Path], None]:
    """A change of the vocabulary of tokenizer.json."""

    def edit(path: Path) -> None:
        content = json.loads(path.read_text())
        change(content["model"]["vocab"])
        path.write_text(json.dumps(content))

    return edit


def moved(vocab: dict[str, int]) -> None:
    """The letter 1 gets an id that the model does not have."""
    vocab["1"] = 5000


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"

DATA_CASES = (
    row("a row without a prompt", prompt=None),
    row("an empty question", **asks("  ")),
    row("half a character in a question", **asks("1+1=\ud800")),
    row("half a character in an answer", reward_model={"ground_truth": "\udc00"}),
    truth("an answer that is missing", None),
    truth("an answer that is no number", float("nan")),
    truth("an endless answer", float("inf")),
    truth("an empty answer", ""),
    row(
        "a number that is none for its scorer",
        data_source="gsm8k",
        reward_model={"ground_truth": "many"},
    ),
    row("a data source that nobody scores", data_source="riddles"),
    line("an integer of 5,000 digits", '{"x": ' + "9" * 5000 + "}", '`{"x": 999...}`'),
    line("lists in lists, too deep", "[" * 100_000, "`[[[[...` 100,000 deep"),
    line("a line that is no JSON", '{"data_source": ', '`{"data_source": `'),
    Case(
        name="data that git-lfs has not fetched",
        brings="its pointer as train.jsonl",
        files={"train.jsonl": POINTER},
    ),
    Case(name="data that is not text", brings="`\\xff`", files={"train.jsonl": b"\xff\n"}),
)

TOKENIZER_CASES = (
    tokenizer_file("no tokenizer.json", "no such file", None, "tokenizer.json"),
    tokenizer_file("no tokenizer_config.json", "no such file", None, "tokenizer_config.json"),
    Case(
        name="a tokenizer that is cut off",
        brings="the first half of tokenizer.json",
        files={"model/tokenizer.json": cut},
    ),
    tokenizer_file(
        "a tokenizer that git-lfs has not fetched", "its pointer", POINTER, "tokenizer.json"
    ),
    tokenizer_file("a tokenizer that is a list", "`[]`", "[]", "tokenizer.json"),
    tokenizer_file("a tokenizer that is empty", "`{}`", "{}", "tokenizer.json"),
    tokenizer_file(
        "settings that are cut off", '`{"eos_token": "<|`', '{"eos_token": "<|', TEMPLATE[6:]
    ),
    tokenizer_file(
        "a special token that is a number", '`{"eos_token": 3}`', '{"eos_token": 3}', TEMPLATE[6:]
    ),
    Case(
        name="a vocabulary without tokens",
        brings="`vocab` of tokenizer.json is empty",
        files={"model/tokenizer.json": vocabulary(dict.clear)},
    ),
    Case(
        name="a token that the model does not have",
        brings="the token `1` has the id 5000",
        files={"model/tokenizer.json": vocabulary(moved)},
    ),
    Case(name="no chat template", brings=code(CHAT), arguments=(CHAT,)),
    template(
        "a template that refuses a system message",
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}",
    ),
    template("a template with a mistake", "{% for m in messages %}{{ m.content }}"),
    template("a template with an unknown name", "{{ nobody.knows }}"),
    template("a template that divides by zero", "{{ 1 // 0 }}"),
    template("a template that says nothing", "{# #}"),
    Case(
        name="templates without a default",
        brings="named chat templates, none of them `default`",
        arguments=(CHAT,),
        files={TEMPLATE: edited(chat_template=[{"name": "rag", "template": "{{ messages }}"}])},
    ),
    template(
        "an argument that no template reads",
        "{{ messages[1].content }}",
        "data.chat_template_kwargs={enable_thinking: false}",
    ),
    template(
        "an argument that is the run's own",
        "{{ messages[1].content }}",
        "data.chat_template_kwargs={add_generation_prompt: false}",
    ),
    Case(
        name="arguments of a template that is not applied",
        brings="`data.chat_template_kwargs={x: 1}` with `data.apply_chat_template=false`",
        arguments=("data.chat_template_kwargs={x: 1}",),
    ),
)
