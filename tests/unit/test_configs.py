"""Configuration: the files in configs/, overrides, and the one clear line for each mistake."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpg_megatron.config.algorithm import PRESETS, AlgorithmConfig
from gpg_megatron.config.loading import config_yaml, load_config
from gpg_megatron.config.ranges import Range, ranges
from gpg_megatron.config.rules import config_warnings, validate
from gpg_megatron.config.sections import Config
from gpg_megatron.errors import UserError
from tests.presets import as_written

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
MINIMAL = "model: {path: some/model}\ndata: {train_files: [train.parquet]}\n"


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    return write(tmp_path, MINIMAL)


def write(folder: Path, text: str | bytes) -> Path:
    file = folder / "config.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


def failure(path: Path, *overrides: str) -> str:
    """The message of the UserError; always a single line."""
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def changed(**sections: dict[str, Any]) -> Config:
    """A valid configuration with some keys of some sections replaced."""
    base = Config()
    needed: dict[str, dict[str, Any]] = {"model": {"path": "m"}, "data": {"train_files": ("a",)}}
    for name in {*needed, *sections}:
        values = needed.get(name, {}) | sections.get(name, {})
        section = dataclasses.replace(getattr(base, name), **values)
        base = dataclasses.replace(base, **{name: section})
    return base


def test_every_shipped_config_loads() -> None:
    files = sorted(CONFIGS.glob("*.yaml"))
    assert "demo_cpu.yaml" in {file.name for file in files}
    for file in files:
        assert isinstance(load_config(file), Config)


@pytest.mark.parametrize(
    "name", ["qwen2-7b_math", "qwen2-7b_math_megatron", "qwen3-8b_math_megatron"]
)
def test_without_a_gpu_the_method_stays(name: str) -> None:
    recipe, small = (
        dataclasses.asdict(load_config(CONFIGS / f"{name}{suffix}.yaml")) for suffix in ("", "_cpu")
    )
    keys = {(section, key) for section, values in recipe.items() for key in values}
    assert {f"{s}.{k}" for s, k in keys if recipe[s][k] != small[s][k]} == {
        "model.dtype", "policy.data_parallel_size", "policy.use_distributed_optimizer",
        "rollout.num_engines", "rollout.tensor_model_parallel_size", "rollout.dtype",
        "rollout.enforce_eager", "reward.num_workers", "trainer.device", "trainer.placement",
        "trainer.output_dir", "logging.wandb",
    }  # fmt: skip


def test_file_values_replace_defaults(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, MINIMAL + "policy: {lr: 3e-4, lr_warmup_steps: 2}\n"))
    assert (config.policy.lr, config.policy.lr_warmup_steps) == (3e-4, 2)
    assert config.data.train_files == ("train.parquet",)
    assert config.rollout == Config().rollout


def test_overrides_replace_file_values(minimal: Path) -> None:
    overrides = [
        "policy.lr=2e-6",
        "rollout.stop=[a,'b c']",
        "data.train_files=[x.parquet,y.jsonl]",
        "trainer.mini_batch_size=16",
        "validation.before_train=false",
        "trainer.output_dir=runs/a=b",
        "policy.lr=3e-6",
    ]
    config = load_config(minimal, overrides)
    assert config.policy.lr == 3e-6
    assert config.rollout.stop == ("a", "b c")
    assert config.data.train_files == ("x.parquet", "y.jsonl")
    assert config.trainer.mini_batch_size == 16
    assert config.validation.before_train is False
    assert config.trainer.output_dir == "runs/a=b"
    assert load_config(minimal, ["trainer.mini_batch_size=null"]).trainer.mini_batch_size is None


def test_derived_sizes() -> None:
    layout = {
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 3,
        "data_parallel_size": 4,
    }
    config = changed(policy=layout, trainer={"train_batch_size": 12})
    assert config.policy.world_size == 24
    assert changed(policy=layout | {"context_parallel_size": 5}).policy.world_size == 120
    assert config.trainer.prompts_per_update == 12
    smaller = changed(trainer={"train_batch_size": 12, "mini_batch_size": 4})
    assert smaller.trainer.prompts_per_update == 4


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("policy: {lrr: 1}", ("policy.lrr", "did you mean policy.lr?")),
        (
            "trainer: {val_before_train: false}",
            ("unknown key trainer.val_before_train; it is validation.before_train now",),
        ),
        ("polcy: {lr: 1}", ("unknown key polcy", "did you mean policy?")),
        ("rollout: {max_respons_length: 1}", ("did you mean rollout.max_response_length?",)),
        ("policy: {xyzzy: 1}", ("unknown key policy.xyzzy", "known: ", "clip_grad")),
        ("xyzzy: 1", ("unknown key xyzzy", "known: data, model")),
        ("1: 2", ("unknown key 1",)),
        ("policy: {lr: abc}", ("policy.lr", "'abc'")),
        ("trainer: {seed: 1.5}", ("trainer.seed", "1.5")),
        ("algorithm: {alpha: foo}", ("algorithm.alpha", "'foo'", "group")),
        ("policy: 3", ("PolicyConfig",)),
        ("policy:", ("policy",)),
        ("rollout: {stop: {a: 1}}", ("config.yaml",)),
        ("trainer: {output_dir: '${no.such}'}", ("trainer.output_dir", "no.such")),
    ],
)
def test_a_mistake_in_the_file(tmp_path: Path, text: str, parts: tuple[str, ...]) -> None:
    file = write(tmp_path, f"{MINIMAL}{text}\n")
    message = failure(file)
    for part in (str(file), *parts):
        assert part in message


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("a: [", "not a readable YAML file"),
        ("a: b: c", "not a readable YAML file"),
        (f"{MINIMAL}model: {{path: twice}}\n", "not a readable YAML file"),
        (b"\xff\xfe\xfa", "not a readable YAML file"),
        ("- a\n- b\n", "is a list"),
        ("just words", "unknown key just words"),
        ("", "model.path is not set"),
    ],
)
def test_a_file_that_is_no_configuration(tmp_path: Path, text: str | bytes, part: str) -> None:
    assert part in failure(write(tmp_path, text))


def test_a_path_that_is_no_file(tmp_path: Path) -> None:
    assert failure(tmp_path / "absent.yaml") == f"config file not found: {tmp_path}/absent.yaml"
    assert str(tmp_path) in failure(tmp_path)


@pytest.mark.parametrize("item", ["policy.lr", "=3", "policy=3", "--x=3", "lr=1", "a.b.c=1", ""])
def test_an_override_without_the_right_form(minimal: Path, item: str) -> None:
    message = failure(minimal, item)
    assert repr(item) in message
    assert "expected a.b=value" in message


@pytest.mark.parametrize(
    ("item", "part"),
    [
        ("policy.lrr=1", "command line: unknown key policy.lrr; did you mean policy.lr?"),
        ("polcy.lr=1", "did you mean policy?"),
        ("trainer.val_n=4", "command line: unknown key trainer.val_n; it is validation.n now"),
        ("policy.lr=[1", "not a YAML value"),
        ("policy.lr=", "policy.lr"),
        ("data.train_files=x.parquet", "data.train_files"),
        ("rollout.temperature=true", "rollout.temperature"),
        ("trainer.max_staleness=-1", "trainer.max_staleness is -1; expected at least 0"),
        ("rollout.update=in-flight", "rollout.update is in-flight with trainer.max_staleness=0"),
        ("rollout.oversample=0.5", "groups can only go on with rollout.update=in-flight"),
        ("rollout.unfinished=cut", "rollout.unfinished is cut with rollout.oversample=0"),
        ("rollout.in_flight_cache=recompute", "in_flight_cache is recompute with rollout.update="),
    ],
)
def test_a_mistake_in_an_override(minimal: Path, item: str, part: str) -> None:
    assert part in failure(minimal, item)


@pytest.mark.parametrize(
    ("bounds", "text", "inside", "outside"),
    [
        ({"at_least": 1}, "at least 1", (1, 2.5, 10**6), (0, 0.99, -4)),
        ({"above": 0}, "greater than 0", (1e-300, 5), (0, -0.0, -1)),
        ({"above": 0, "at_most": 1}, "greater than 0 and at most 1", (0.5, 1), (0, 1.01)),
        ({"at_least": 0, "below": 1}, "at least 0 and less than 1", (0, 0.99), (-0.01, 1)),
        ({"at_least": 1, "or_value": -1}, "at least 1, or -1", (-1, 1, 9), (-2, 0, 0.5)),
        ({}, "a finite number", (-1e300, 0, 7), ()),
    ],
)
def test_a_range(
    bounds: dict[str, float], text: str, inside: tuple[float, ...], outside: tuple[float, ...]
) -> None:
    allowed = Range(**bounds)
    assert str(allowed) == text
    assert all(number in allowed for number in inside)
    assert not any(number in allowed for number in (*outside, math.nan, math.inf, -math.inf))


@pytest.mark.parametrize("key", [key for key, _, _ in ranges(Config())])
def test_a_key_has_its_range_enforced(key: str) -> None:
    section, name = key.split(".")
    with pytest.raises(UserError, match=f"^{re.escape(key)} is nan; expected [a-z]"):
        validate(changed(**{section: {name: math.nan}}))


@pytest.mark.parametrize(
    ("key", "value", "right"),
    [
        ("policy.lr", 0.0, "greater than 0"),
        ("policy.adam_beta1", 1.0, "at least 0 and less than 1"),
        ("trainer.mini_batch_size", 0, "at least 1"),
        ("rollout.top_p", 1.01, "greater than 0 and at most 1"),
        ("validation.top_k", 0, "at least 1, or -1"),
        ("algorithm.alpha_max", 0.5, "at least 1, or 0"),
        ("algorithm.beta_th", 1.01, "at least 0 and at most 1"),
        ("reward.timeout_score", -math.inf, "a finite number"),
    ],
)
def test_a_value_outside_of_its_range(key: str, value: float, right: str) -> None:
    section, name = key.split(".")
    with pytest.raises(UserError) as caught:
        validate(changed(**{section: {name: value}}))
    assert str(caught.value) == f"{key} is {value}; expected {right}"


@pytest.mark.parametrize(
    ("section", "values"),
    [
        ("algorithm", {"beta_th": 0.0}),
        ("algorithm", {"beta_th": 1.0}),
        ("rollout", {"top_p": 1.0, "top_k": -1}),
        ("rollout", {"top_p": 0.5, "top_k": 1}),
        ("policy", {"clip_grad": 0.0, "min_lr": 0.0, "lr": 1e-9}),
        ("policy", {"data_parallel_size": 4, "expert_model_parallel_size": 4}),
        ("trainer", {"train_batch_size": 6, "mini_batch_size": 3}),
        ("validation", {"temperature": 0.0}),
    ],
)
def test_values_at_the_edge_of_their_range(section: str, values: dict[str, Any]) -> None:
    validate(changed(**{section: values}))


def test_every_number_has_a_range() -> None:
    numbers = {
        f"{section.name}.{key.name}"
        for section in dataclasses.fields(Config)
        for key in dataclasses.fields(getattr(Config(), section.name))
        if key.type in ("int", "float", "Optional[int]", "Optional[float]")
    }
    assert {key for key, _, _ in ranges(Config())} == numbers


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"model": {"path": ""}},
            "model.path is not set; expected a Hugging Face directory or ORG/NAME",
        ),
        (
            {"data": {"train_files": ()}},
            "data.train_files is empty; expected at least one file",
        ),
        (
            {"trainer": {"train_batch_size": 8, "mini_batch_size": 3}},
            "trainer.mini_batch_size (3) does not divide trainer.train_batch_size (8); "
            "expected a divisor of it",
        ),
        (
            {"policy": {"data_parallel_size": 4, "expert_model_parallel_size": 3}},
            "policy.expert_model_parallel_size (3) does not divide policy.data_parallel_size (4); "
            "expected a divisor of it",
        ),
        (
            {"trainer": {"placement": "colocated"}, "bridge": {"transport": "nccl"}},
            "bridge.transport is nccl with trainer.placement=colocated; expected auto, shm, gloo "
            "or cuda_ipc: NCCL refuses two processes on one GPU",
        ),
        (
            {"bridge": {"transport": "cuda_ipc"}},
            "bridge.transport is cuda_ipc with trainer.placement=disaggregated; expected auto, "
            "shm, gloo or nccl: rank and engine have different GPUs",
        ),
        (
            {"policy": {"sequence_parallel": True}},
            "policy.sequence_parallel is true, but policy.tensor_model_parallel_size is 1; "
            "expected false",
        ),
        (
            {"policy": {"lr": 1e-6, "min_lr": 1e-5}},
            "policy.min_lr (1e-05) exceeds policy.lr (1e-06); expected at most lr",
        ),
        (
            {"validation": {"n": 4, "temperature": 0.0}},
            "validation.n is 4 with validation.temperature=0, where all answers are the same; "
            "expected 1",
        ),
    ],
)
def test_values_that_do_not_fit_together(sections: dict[str, dict[str, Any]], message: str) -> None:
    with pytest.raises(UserError) as caught:
        validate(changed(**sections))
    assert str(caught.value) == message


# presets


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_sets_the_defaults_and_the_user_wins(minimal: Path, preset: str) -> None:
    config = load_config(minimal, [f"algorithm.preset={preset}"])
    assert config.algorithm == as_written(preset)
    for key, value in PRESETS[preset].items():
        assert getattr(config.algorithm, key) == value != getattr(AlgorithmConfig(), key)
    chosen = load_config(minimal, [f"algorithm.preset={preset}", "algorithm.f_norm_eps=0.25"])
    assert chosen.algorithm == dataclasses.replace(config.algorithm, f_norm_eps=0.25)


def test_a_value_that_is_set_to_the_papers_default_wins_too(tmp_path: Path) -> None:
    file = write(tmp_path, MINIMAL + "algorithm: {preset: amap, alpha_scope: batch}\n")
    algorithm = load_config(file).algorithm
    assert (algorithm.alpha_scope, algorithm.beta_th) == ("batch", 0.5)
    assert load_config(file, ["algorithm.beta_th=0.0"]).algorithm.beta_th == 0.0


def test_the_preset_of_the_command_line_replaces_that_of_the_file(tmp_path: Path) -> None:
    file = write(tmp_path, MINIMAL + "algorithm: {preset: amap, alpha_max: 3.0}\n")
    got = load_config(file, ["algorithm.preset=verl"]).algorithm
    assert got == as_written("verl", alpha_max=3.0)


def test_a_preset_may_be_the_value_of_another_key(tmp_path: Path) -> None:
    text = "algorithm: {preset: '${logging.wandb_project}'}\nlogging: {wandb_project: rloo}\n"
    assert load_config(write(tmp_path, MINIMAL + text)).algorithm == as_written("rloo")


@pytest.mark.parametrize("preset", PRESETS)
def test_a_resolved_preset_loads_back_equal(tmp_path: Path, preset: str) -> None:
    config = load_config(write(tmp_path, MINIMAL), [f"algorithm.preset={preset}"])
    assert load_config(write(tmp_path, config_yaml(config))) == config


def test_an_unknown_preset(minimal: Path) -> None:
    assert "algorithm.preset" in failure(minimal, "algorithm.preset=ppo")


SEVERAL = {"train_batch_size": 8, "mini_batch_size": 2}
AHEAD = {"max_staleness": 1}
FREE = {"dead_by": "none", "alpha": "none"}


@pytest.mark.parametrize(
    ("sections", "parts"),
    [
        (
            {"algorithm": {"beta_th": 0.5, "filter_groups": True}},
            ("algorithm.beta_th is 0.5", "filter_groups", "one of the two"),
        ),
        (
            {"algorithm": {"beta_th": 0.5, **FREE}},
            ("algorithm.beta_th", "dead_by is none", "expected accuracy"),
        ),
        (
            {"algorithm": {"filter_groups": True, **FREE}},
            ("algorithm.filter_groups", "dead_by is none"),
        ),
        ({"algorithm": {"dead_by": "none"}}, ("algorithm.alpha=group", "expected", "nonzero")),
        (
            {
                "algorithm": {"correction": "truncate-token", "old_logprobs": "rollout"},
                "rollout": {"top_p": 0.9},
            },
            ("algorithm.correction=truncate-token", "top_p", "top_p=1"),
        ),
        (
            {"algorithm": {"correction": "truncate-token", "old_logprobs": "current"}},
            ("algorithm.correction=truncate-token", "old_logprobs=current", "rollout"),
        ),
        (
            {"algorithm": {"loss": "clip", "old_logprobs": "rollout"}, "rollout": {"top_k": 20}},
            ("algorithm.old_logprobs=rollout", "top_k"),
        ),
        (
            {"algorithm": {"loss": "clip", "old_logprobs": "rollout", "correction": "mask-token"}},
            ("algorithm.correction=mask-token", "old_logprobs=policy"),
        ),
        (
            {"algorithm": {"loss": "clip", "old_logprobs": "current"}, "trainer": SEVERAL},
            ("algorithm.old_logprobs=current", "4 optimizer steps", "policy", "rollout"),
        ),
        (
            {"algorithm": {"correction_min": 3.0}},
            ("algorithm.correction_min (3.0)", "correction_max (2.0)"),
        ),
        ({"rollout": {"n": 1}}, ("rollout.n is 1", "at least 2")),
        (
            {"rollout": {"n": 1}, "algorithm": {"f_norm": "std", **FREE}},
            ("f_norm", "rollout.n is 1"),
        ),
    ],
)
def test_an_objective_that_contradicts_itself(
    sections: dict[str, dict[str, Any]], parts: tuple[str, ...]
) -> None:
    with pytest.raises(UserError) as caught:
        validate(changed(**sections))
    message = str(caught.value)
    assert "\n" not in message
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    "sections",
    [
        {"rollout": {"n": 1}, "algorithm": {"dead_by": "none", "alpha": "nonzero"}},
        {"algorithm": {"loss": "clip"}},
        {"algorithm": {"loss": "clip", "old_logprobs": "policy"}, "trainer": SEVERAL},
        {"algorithm": {"correction": "truncate-token"}, "rollout": {"top_p": 0.9}},
        {"algorithm": {"alpha_max": 1.0}},
        {"rollout": {"top_p": 0.9}},
        {"algorithm": {"correction_min": 2.0}},
    ],
)
def test_an_objective_that_is_legal(sections: dict[str, dict[str, Any]]) -> None:
    validate(changed(**sections))


@pytest.mark.parametrize(
    ("sections", "n_warnings"),
    [
        ({}, 0),
        ({"trainer": SEVERAL}, 0),
        ({"trainer": SEVERAL, "algorithm": {"correction": "none"}}, 1),
        ({"trainer": SEVERAL, "algorithm": {"correction": "truncate-token"}}, 0),
        ({"trainer": SEVERAL, "algorithm": {"loss": "clip", "old_logprobs": "policy"}}, 0),
        ({"trainer": {"train_batch_size": 8, "mini_batch_size": 8}}, 0),
        ({"trainer": AHEAD}, 0),
        ({"trainer": AHEAD, "algorithm": {"correction": "none"}}, 1),
        ({"trainer": AHEAD, "rollout": {"top_p": 0.9}}, 1),
        ({"trainer": AHEAD | SEVERAL, "rollout": {"top_p": 0.9}}, 1),
        ({"trainer": AHEAD, "algorithm": {"loss": "clip", "old_logprobs": "policy"}}, 1),
        ({"trainer": AHEAD, "algorithm": {"correction": "truncate-token"}}, 0),
        ({"trainer": AHEAD, "algorithm": {"loss": "clip", "old_logprobs": "rollout"}}, 0),
    ],
)
def test_off_policy_updates_that_nothing_corrects_are_warned_of(
    sections: dict[str, dict[str, Any]], n_warnings: int
) -> None:
    found = config_warnings(changed(**sections))
    assert len(found) == n_warnings
    assert all("\n" not in line for line in found)
    assert all("algorithm.correction" in line or "rollout.top_p" in line for line in found)


text = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=12).filter(
    lambda x: "${" not in x and x != "???"  # OmegaConf's own syntax
)


@settings(max_examples=25)
@given(
    path=text.filter(bool),
    files=st.lists(text, min_size=1, max_size=3),
    stop=st.lists(text.filter(bool), max_size=3),
    lr=st.floats(1e-9, 1.0),
    temperature=st.floats(0.01, 2.0),
    seed=st.integers(0, 2**31),
    val_max_rows=st.none() | st.integers(1, 1000),
    alpha=st.sampled_from(["none", "group", "token"]),
    shuffle=st.booleans(),
)
def test_yaml_round_trip(
    tmp_path_factory: pytest.TempPathFactory,
    path: str,
    files: list[str],
    stop: list[str],
    lr: float,
    temperature: float,
    seed: int,
    val_max_rows: int | None,
    alpha: str,
    shuffle: bool,
) -> None:
    config = changed(
        model={"path": path},
        data={"train_files": tuple(files), "val_max_rows": val_max_rows, "shuffle": shuffle},
        policy={"lr": lr},
        rollout={"stop": tuple(stop), "temperature": temperature},
        trainer={"seed": seed},
        algorithm={"alpha": alpha},
    )
    file = write(tmp_path_factory.mktemp("round_trip"), config_yaml(config))
    assert load_config(file) == config


@pytest.mark.parametrize(
    ("weights", "message"),
    [("[1]", "has 1 entries for 2 training files"), ("[1, 0]", "is [1.0, 0.0]; expected numbers")],
)
def test_weights_of_training_files(minimal: Path, weights: str, message: str) -> None:
    files = "data.train_files=[a.parquet,b.parquet]"
    assert message in failure(minimal, files, f"data.train_weights={weights}")
    assert load_config(minimal, [files, "data.train_weights=[1,3]"]).data.train_weights == (1, 3)


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ({"by_source": {"x*": "maths"}}, "reward.by_source gives 'x*' 'maths'; expected exact_ma"),
        ({"weights": {"style": 1.0}}, "reward.weights.style is unknown; expected answer, format"),
        ({"weights": {"answer": math.inf}}, "reward.weights.answer is inf; expected a finite"),
        ({"scorer": "custom"}, "reward.custom_function is not set; expected FILE.py:NAME"),
        ({"custom_function": "a.py:f"}, "reward.custom_function is set, but nothing uses it"),
        ({"overlong_buffer": 10}, "reward.overlong_buffer is 10; expected from 1 to"),
        ({"weights": {"overlong": 1.0}}, "reward.overlong_buffer is 0; expected from 1 to"),
        (
            {"weights": {"overlong": 1.0}, "overlong_buffer": 1025},
            "reward.overlong_buffer is 1025; expected from 1 to rollout.max_response_length",
        ),
        ({"format_pattern": "("}, "reward.format_pattern: not a regular expression"),
    ],
)
def test_reward_keys_that_do_not_fit(reward: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        validate(changed(reward=reward))
    assert str(caught.value).startswith(message)


def test_reward_keys_that_fit(minimal: Path) -> None:
    config = load_config(
        minimal,
        [
            "reward.by_source={a*: math, b: custom}",
            "reward.custom_function=f.py:g",
            "reward.weights={format: 0.1, overlong: 1}",
            "reward.overlong_buffer=128",
        ],
    )
    assert config.reward.weights == {"answer": 1.0, "format": 0.1, "overlong": 1.0}
    assert config.reward.by_source == {"a*": "math", "b": "custom"}


@pytest.mark.parametrize(
    ("sections", "named"),
    [
        ({"reward": {"weights": {"answer": 1.0, "format": 0.1}}}, "reward.weights.format"),
        ({"reward": {"timeout_score": -1.0}}, "reward.timeout_score"),
        ({"reward": {"weights": {"answer": 2.0, "format": 0.0}}}, None),
        ({}, None),
    ],
)
def test_an_alpha_of_nonzero_scores_is_warned_of_shaped_ones(
    sections: dict[str, dict[str, Any]], named: str | None
) -> None:
    assert config_warnings(changed(**sections, algorithm={"preset": "paper"})) == []
    found = config_warnings(changed(**sections, algorithm={"alpha": "nonzero"}))
    assert [str(named) in line for line in found] == ([True] if named else [])


def test_a_batch_is_not_drawn_ahead_by_engines_that_sleep() -> None:
    with pytest.raises(UserError, match=r"trainer\.max_staleness is 1 with .*colocated"):
        validate(changed(trainer={"max_staleness": 1, "placement": "colocated"}))
