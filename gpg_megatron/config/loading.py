"""Read a YAML file and a.b=value overrides into a Config. The only file that knows OmegaConf."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException
from yaml import YAMLError

from gpg_megatron.config.algorithm import PRESETS
from gpg_megatron.config.by_name import find_config, shipped_configs
from gpg_megatron.config.overrides import is_text, split_override, text_value
from gpg_megatron.config.paths import expanded
from gpg_megatron.config.rules import validate
from gpg_megatron.config.sections import Config
from gpg_megatron.errors import UserError, reason_of

MAX_DEPTH = 100

_MOVED = {
    "trainer.val_before_train": "validation.before_train",
    "trainer.val_n": "validation.n",
    "trainer.val_temperature": "validation.temperature",
    "trainer.val_top_p": "validation.top_p",
    "trainer.val_top_k": "validation.top_k",
    "trainer.val_save_generations": "validation.save_generations",
}
"""What a key of an earlier version is called now; only to say so."""

_LIBRARY = (YAMLError, OmegaConfBaseException, ValueError, OverflowError, RecursionError)
"""What is raised about a user's text: numbers may have too many digits, lists too much depth."""


def load_config(
    path: str | Path | None,
    overrides: Sequence[str] = (),
    *,
    trains: bool = True,
    has_model: bool = True,
) -> Config:
    """Read a YAML file, apply "a.b=value" overrides, check types and cross-field rules.

    Args:
        path: a file, or the name of a shipped configuration; None: there are the overrides only.
        trains: False for a command that only evaluates and needs no training files.
        has_model: False for one that scores saved answers.

    Raises:
        UserError: missing or malformed file, unknown key (the nearest known one is named),
            wrong type, or values that do not fit together.
    """
    layers = {} if path is None else {str(path): _read(path)}
    layers["command line"] = _parse(overrides)
    defaults = OmegaConf.structured(Config)
    merged = _merge(defaults, layers)
    try:
        # The preset lies below whatever the user sets, wherever the user names it.
        preset = OmegaConf.create({"algorithm": dict(PRESETS[merged.algorithm.preset])})
        config = OmegaConf.to_object(_merge(OmegaConf.merge(defaults, preset), layers))
    except _LIBRARY as error:
        raise UserError(f"{path or 'command line'}: {_one_line(error)}") from None
    assert isinstance(config, Config)
    whole: Config = expanded(config)
    validate(whole, trains=trains, has_model=has_model)
    return whole


def _merge(defaults: Any, layers: Mapping[str, DictConfig]) -> Any:
    """The layers, the last one on top; where a layer comes from -> the layer."""
    merged = defaults
    for where, layer in layers.items():
        try:
            merged = OmegaConf.merge(merged, layer)
        except ConfigKeyError as error:
            raise UserError(f"{where}: {_unknown(str(error.full_key))}") from None
        except (*_LIBRARY, TypeError) as error:
            raise UserError(f"{where}: {_one_line(error)}") from None
    return merged


def config_yaml(config: Config) -> str:
    """The resolved configuration as YAML; load_config reads it back to an equal object."""
    return OmegaConf.to_yaml(OmegaConf.create(_literal(dataclasses.asdict(config))))


def _read(path: str | Path) -> DictConfig:
    try:
        file = find_config(path)
        _check_depth(file.read_text(encoding="utf-8"))
        content = OmegaConf.load(file)
    except FileNotFoundError:
        is_name = str(path) == Path(path).stem
        known = f"; known by name: {', '.join(shipped_configs())}" if is_name else ""
        raise UserError(f"config file not found: {path}{known}") from None
    except (*_LIBRARY, OSError) as error:
        raise UserError(f"{path}: not a readable YAML file: {_one_line(error)}") from None
    if not isinstance(content, DictConfig):
        raise UserError(f"{path}: is a list; expected sections, for example policy: {{lr: 1e-6}}")
    return content


def _parse(overrides: Sequence[str]) -> DictConfig:
    layer: Any = OmegaConf.create()
    for item in overrides:
        key, value = split_override(item)
        try:
            if not is_text(key):
                _check_depth(value)
            one = OmegaConf.from_dotlist([item] if not is_text(key) else [])
            if is_text(key):
                OmegaConf.update(one, key, _literal(text_value(key, value)))
            layer = OmegaConf.merge(layer, one)
        except _LIBRARY as error:
            raise UserError(
                f"override {item[:80]!r}: not a YAML value: {_one_line(error)}"
            ) from None
    assert isinstance(layer, DictConfig)
    return layer


def _check_depth(text: str) -> None:
    """The parser in C that OmegaConf uses ends the process where its stack overflows.

    Raises:
        YAMLError: no YAML, or lists in lists in lists ...
    """
    depth = 0
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    for event in yaml.parse(text, Loader=loader):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise YAMLError(f"nested more than {MAX_DEPTH} deep")


def _literal(value: Any) -> Any:
    """With every text as it is: OmegaConf would look for another key between ${ and }."""
    if isinstance(value, dict):
        return {key: _literal(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_literal(item) for item in value]
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    return value


def _unknown(key: str) -> str:
    """ "unknown key ...", with the nearest known key or, failing that, all keys of its section."""
    if key in _MOVED:
        return f"unknown key {key}; it is {_MOVED[key]} now"
    section, _, name = key.partition(".")
    types = {f.name: type(getattr(Config(), f.name)) for f in dataclasses.fields(Config)}
    has_section = bool(name) and section in types
    known = [f.name for f in dataclasses.fields(types[section])] if has_section else list(types)
    near = difflib.get_close_matches(name if has_section else section, known, n=1)
    prefix = f"{section}." if has_section else ""
    hint = f"did you mean {prefix}{near[0]}?" if near else f"known: {', '.join(known)}"
    return f"unknown key {key}; {hint}"


def _one_line(error: Exception) -> str:
    """The message with the full key, without OmegaConf's lines of type bookkeeping."""
    if mark := getattr(error, "problem_mark", None):  # of a YAMLError
        return f"line {mark.line + 1}, column {mark.column + 1}: {getattr(error, 'problem', '')}"
    if not isinstance(error, OmegaConfBaseException):
        return reason_of(error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    key = next((x.removeprefix("full_key: ") for x in lines if x.startswith("full_key: ")), "")
    return f"{key}: {lines[0]}" if key else lines[0]
