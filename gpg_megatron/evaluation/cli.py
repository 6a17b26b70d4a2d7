"""gpg-eval: answer the problems of data sets with vLLM and say how many answers are right."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from gpg_megatron import __version__
from gpg_megatron.config.loading import config_yaml, load_config
from gpg_megatron.config.sections import Config
from gpg_megatron.data.catalog import DATA_SETS, load_split
from gpg_megatron.data.prompts import file_labels, render_all
from gpg_megatron.data.schema import Problem, parse_row, read_problems
from gpg_megatron.errors import RunError, UserError, exit_codes, writing
from gpg_megatron.evaluation import compare
from gpg_megatron.evaluation.evaluate import answer_all, by_source, write_generations
from gpg_megatron.evaluation.metrics import Estimate, powers_of_two
from gpg_megatron.evaluation.saved import read_generations
from gpg_megatron.model.hub import fetched, local_directory
from gpg_megatron.reward.pool import RewardPool
from gpg_megatron.reward.sources import check_prompts
from gpg_megatron.reward.trial import try_custom_function
from gpg_megatron.rollout.sampling import Sampler, greedy, validation_params
from gpg_megatron.types import Completion, Prompt, SamplingParams, ScoredGroup

RESULT_FILE = "eval.json"
GENERATIONS_FILE = "generations.jsonl"
COMPARE_FILE = "compare.jsonl"
CONFIG_FILE = "config.yaml"

Saved = Mapping[str, Sequence[tuple[Prompt, Sequence[Completion]]]]
"""Mode -> problems with answers that have no scores yet."""


@exit_codes
def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 done, 2 bad input (one line on stderr), 1 an engine failed."""
    args = _parser().parse_intermixed_args(argv)
    if args.rescore and (args.source or args.max_rows or args.greedy):
        raise UserError("--rescore with --source, --max-rows or --greedy; expected it alone")
    config = load_config(args.config, args.overrides, trains=False, has_model=not args.rescore)
    if not args.rescore:
        config = replace(config, model=fetched(config.model))
    out = Path(args.out)
    saved = read_generations(args.rescore) if args.rescore else {}
    if args.rescore and out.resolve() == Path(args.rescore).resolve().parent:
        raise UserError(f"--out {out} holds the answers of --rescore; expected another folder")
    modes = {} if saved else _modes(config, with_greedy=args.greedy)
    prompts = _prompts_of(saved) if saved else _prompts(args, config)
    check_prompts(prompts, config.reward)
    try_custom_function(prompts, config.reward)
    scorers = compare.scorers_to_compare(args.compare, config.reward, prompts)
    _prepare(out, config)
    try:
        answered = _rescored(config, saved, out) if saved else _run(config, modes, prompts, out)
    except (RunError, TimeoutError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    sets = _sets(answered)
    path = out / RESULT_FILE
    result = {"arguments": vars(args), "sets": sets}
    with writing(path):
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print("\n".join(_table(sets)))
    print(f"{path}, {out / GENERATIONS_FILE}", flush=True)
    if scorers:
        rows = compare.judge(answered, scorers, config.reward)
        console = Console(highlight=False, markup=False)
        for part in compare.report(rows, out / COMPARE_FILE):
            console.print(part, soft_wrap=isinstance(part, str))
    return 0


def _modes(config: Config, *, with_greedy: bool) -> dict[str, SamplingParams]:
    """Name of a mode -> how it answers. Raises UserError."""
    seed = config.trainer.seed
    params = validation_params(config.validation, config.rollout, seed=seed)
    if not with_greedy:
        return {"sampled" if params.temperature else "greedy": params}
    if params.temperature == 0:
        raise UserError("--greedy with validation.temperature=0: the answers are greedy already")
    return {"sampled": params, "greedy": greedy(params)}


def _prepare(out: Path, config: Config) -> None:
    """The folder of the results, without an earlier evaluation's. Raises UserError."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / CONFIG_FILE).write_text(config_yaml(config), encoding="utf-8")
        for name in (RESULT_FILE, GENERATIONS_FILE, COMPARE_FILE):
            (out / name).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}; expected a folder to write to") from None


def _run(
    config: Config, modes: Mapping[str, SamplingParams], prompts: Sequence[Prompt], out: Path
) -> dict[str, list[ScoredGroup]]:
    """Start the engines, answer, score; leave nothing of it behind but files in out."""
    from gpg_megatron.bridge.forecast import worker_parameters
    from gpg_megatron.bridge.protocol import RECEIVER
    from gpg_megatron.host.device import device_bytes, resolve_device
    from gpg_megatron.host.reaper import cleanup_run, new_run_id, scratch_directory, start_reaper
    from gpg_megatron.model.shape import load_model_shape
    from gpg_megatron.placement.memory import fitting_limits
    from gpg_megatron.rollout.fleet import Fleet
    from gpg_megatron.rollout.spec import EngineSpec

    run_id = new_run_id()
    longest = config.rollout.max_response_length
    device = resolve_device(config.trainer.device)
    directory = local_directory(config.model)
    shape = load_model_shape(directory)
    n_parameters = worker_parameters(shape, config.rollout.tensor_model_parallel_size)
    limits = fitting_limits(
        config, shape, n_parameters=n_parameters, device_bytes=device_bytes(device)
    )
    spec = EngineSpec(
        rollout=config.rollout,
        model_path=str(directory.resolve()),
        device=device,
        max_model_len=config.data.max_prompt_length + longest,
        max_num_seqs=limits.max_num_seqs,
        max_num_batched_tokens=limits.max_num_batched_tokens,
        has_states=shape.delta is not None,
        is_latent=shape.latent is not None,
        worker_extension=RECEIVER,
        scratch=scratch_directory(run_id),
    )
    start_reaper(run_id)
    fleet = None
    try:
        fleet = Fleet.start(spec, run_id=run_id, log_dir=out / "logs")
        with closing(RewardPool(config.reward, max_response_length=longest)) as pool:
            fleet.wait_ready()
            return _answer(fleet, pool, modes, prompts, out / GENERATIONS_FILE)
    finally:
        if fleet is not None:
            fleet.close()
        cleanup_run(run_id)


def _prompts_of(saved: Saved) -> tuple[Prompt, ...]:
    prompts = {prompt.id: prompt for items in saved.values() for prompt, _ in items}
    return tuple(prompts.values())


def _rescored(config: Config, saved: Saved, out: Path) -> dict[str, list[ScoredGroup]]:
    """The saved answers with new scores, which are also written."""
    longest = config.rollout.max_response_length
    answered = {}
    with closing(RewardPool(config.reward, max_response_length=longest)) as pool:
        for mode, items in saved.items():
            answered[mode] = pool.score(items)
            write_generations(out / GENERATIONS_FILE, answered[mode], extra_info=True, mode=mode)
    return answered


def _answer(
    sampler: Sampler,
    pool: RewardPool,
    modes: Mapping[str, SamplingParams],
    prompts: Sequence[Prompt],
    generations: Path,
) -> dict[str, list[ScoredGroup]]:
    """Mode -> its answers, which are also written."""
    answered = {}
    for mode, params in modes.items():
        answered[mode] = answer_all(sampler, pool, prompts, params)
        write_generations(generations, answered[mode], extra_info=True, mode=mode)
    return answered


def _sets(answered: compare.Answered) -> dict[str, Any]:
    """data_source -> mode -> {problems, metrics, ...}."""
    sets: dict[str, Any] = {}
    for mode, groups in answered.items():
        ks = powers_of_two(max(len(group.completions) for group in groups))
        for source, estimates in by_source(groups, ks).items():
            sets.setdefault(source, {})[mode] = _summary(groups, source, estimates)
    return sets


def _summary(
    groups: Sequence[ScoredGroup], source: str, estimates: dict[str, Estimate]
) -> dict[str, Any]:
    mine = [group for group in groups if group.prompt.data_source == source]
    completions = [c for group in mine for c in group.completions]
    missing = (compare.without_verdict(reward) for group in mine for reward in group.rewards)
    return {
        "problems": len(mine),
        "tokens_mean": sum(len(c.token_ids) for c in completions) / len(completions),
        "clipped_fraction": sum(c.finish_reason == "length" for c in completions)
        / len(completions),
        "without_verdict": Counter(reason for reason in missing if reason),
        "metrics": {
            name: {**asdict(x), "low": x.low, "high": x.high} for name, x in estimates.items()
        },
    }


def _table(sets: dict[str, Any]) -> list[str]:
    """One line for each metric."""
    lines = []
    for source, modes in sets.items():
        for mode, summary in modes.items():
            for name, x in summary["metrics"].items():
                interval = f"  [{x['low']:.4f}, {x['high']:.4f}]" if x["half_width"] else ""
                head = f"{source} ({summary['problems']} problems, {mode})"
                lines.append(f"{head} {name}: {x['value']:.4f}{interval}")
            if summary["without_verdict"]:
                missing = compare.listed(summary["without_verdict"])
                lines.append(f"{source} ({mode}) answers without a verdict: {missing}")
    return lines


def _prompts(args: argparse.Namespace, config: Config) -> tuple[Prompt, ...]:
    """Of all data sets. Raises UserError: the model, the data or the lengths do not fit."""
    from gpg_megatron.data.tokenizer import check_stop, load_tokenizer
    from gpg_megatron.host.device import resolve_device
    from gpg_megatron.model.layout_rules import (
        check_engine_packages,
        check_engine_type,
        check_engines,
    )
    from gpg_megatron.model.shape import load_model_shape, shape_warnings
    from gpg_megatron.rollout.engine_args import check_engine_args

    directory = local_directory(config.model)
    shape = load_model_shape(directory)
    check_engines(config, shape)
    check_engine_type(config, shape, resolve_device(config.trainer.device))
    check_engine_args(config.rollout)
    check_engine_packages(shape)
    for line in shape_warnings(directory):
        print(f"warning: {line}", file=sys.stderr)
    problems = _problems(args.data, args.source, args.max_rows, config.data.custom_class)
    tokenizer = load_tokenizer(directory)
    check_stop(tokenizer, config.rollout.stop)
    loaded = render_all(problems, config.data, tokenizer, shape.vocab_size)
    for line in loaded.warnings:
        print(f"warning: {line}", file=sys.stderr)
    print(
        f"{len(loaded.prompts)} problems, {loaded.n_filtered} left out because they are too long",
        flush=True,
    )
    return loaded.prompts


def _problems(
    data: Sequence[str], source: str | None, max_rows: int | None, custom_class: str | None
) -> dict[str, list[Problem]]:
    """Name or file label -> its problems, the first max_rows of them."""
    files = [x for x in data if x not in DATA_SETS]
    for file in files:
        if not Path(file).is_file():
            raise UserError(
                f"--data {file}: no such file, and no data set; known: {', '.join(DATA_SETS)}"
            )
    found = {
        label: read_problems(file, custom_class)[:max_rows]
        for label, file in zip(file_labels(files), files, strict=True)
    }
    for name in (x for x in data if x in DATA_SETS):
        if name in found:
            raise UserError(f"--data {name}: two data sets have this name; expected one")
        rows = load_split(name, source, "test", max_rows).rows
        found[name] = [parse_row(row, f"{name} row {i}") for i, row in enumerate(rows, start=1)]
    return found


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gpg-eval", description=__doc__)
    add = parser.add_argument
    add("--version", action="version", version=__version__)
    names = ", ".join(DATA_SETS)
    add("--config", metavar="FILE", help="YAML, or the name of one that comes with the package")
    add("overrides", nargs="*", metavar="a.b=value", help="replaces a key, as model.path=DIR")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--data", nargs="+", help=f"files in the row schema, or names: {names}")
    what.add_argument(
        "--rescore", metavar="FILE", help="answers to score again, as generations.jsonl"
    )
    add("--source", help="local file or folder for the names; without it, Hugging Face")
    add("--max-rows", type=_positive, help="only the first N problems of each")
    add("--greedy", action="store_true", help="also one greedy answer to each problem")
    add("--compare", metavar="A,B", help="scorers whose verdicts on all answers are compared")
    add("--out", required=True, metavar="DIR", help="where results and generations are written")
    return parser


if __name__ == "__main__":
    sys.exit(main())
