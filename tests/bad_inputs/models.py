"""What a model's directory can have wrong, and its name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from tests.bad_inputs.case import Case, Content, code, edited, given

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
DEEP = "[" * 100_000


def key(name: str, **change: object) -> Case:
    """A changed key of config.json."""
    brings = code(json.dumps(change)[1:-1])
    return Case(name=name, brings=brings, files={"model/config.json": edited(**change)})


def config(name: str, brings: str, content: Content) -> Case:
    """Another config.json."""
    return Case(name=name, brings=brings, files={"model/config.json": content})


def weights(name: str, brings: str, content: Content) -> Case:
    """Another model.safetensors."""
    return Case(name=name, brings=brings, files={"model/model.safetensors": content})


def cut(n_bytes: int) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(path.read_bytes()[:n_bytes])


CASES = (
    given("a path that is no directory", "model.path=nowhere"),
    given("a model of the Hub that cannot be fetched", "model.path=Qwen/Qwen3-8B"),
    given("a revision of a directory", "model.revision=main"),
    config("no config.json", "no config.json", None),
    config("a config.json that is cut off", '`{"architectures": [`', '{"architectures": ['),
    config("a config.json that is a list", "`[]`", "[]"),
    config("a config.json nested 100,000 deep", "`[[[[...`", DEEP),
    config("a config.json of git-lfs", "a pointer of git-lfs", POINTER),
    config("a config.json with NaN", '`{"rope_theta": NaN}`', '{"rope_theta": NaN}'),
    config("a lone surrogate", '`{"a": "\\ud800"}`', '{"a": "\\ud800"}'),
    config(
        "a config.json with an integer of 5,000 digits",
        '`{"vocab_size": 999...`',
        f'{{"a": {"9" * 5000}}}',
    ),
    key("an unknown architecture", architectures=["Gpt2LMHeadModel"]),
    key("architectures that is a text", architectures="Qwen2ForCausalLM"),
    key("a size in quotes", hidden_size="128"),
    key("a size with a point", hidden_size=128.0),
    key("no layers", num_hidden_layers=0),
    key("quantised weights", quantization_config={"quant_method": "fp8"}),
    key("a rotary embedding of a part of a head", partial_rotary_factor=0.5),
    key("another activation", hidden_act="gelu"),
    key("heads that do not divide", num_key_value_heads=3),
    weights("no weights", "no *.safetensors", None),
    weights("weights that are cut off", "its first 1,000 bytes", cut(1000)),
    weights("weights of git-lfs", "a pointer of git-lfs", POINTER),
    key("weights of another shape", intermediate_size=512),
    key("weights that are missing", num_hidden_layers=5),
    Case(
        name="an index of weights that are not there",
        brings='`"weight_map": {"a": "b.safetensors"}`',
        files={
            "model/model.safetensors.index.json": json.dumps({"weight_map": {"a": "b.safetensors"}})
        },
    ),
)
