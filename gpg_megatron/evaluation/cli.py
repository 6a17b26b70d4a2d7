"""gpg-eval: answer the problems of data sets with vLLM and say how many answers are right."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from gpg_megatron.config.sections import (
    Config,
    DataConfig,
    ModelConfig,
    RewardConfig,
    RolloutConfig,
)
from gpg_megatron.data.catalog import DATA_SETS, load_split
from gpg_megatron.data.prompts import file_labels, render_all
from gpg_megatron.data.schema import Problem, parse_row, read_problems
from gpg_megatron.errors import UserError, exit_codes
from gpg_megatron.evaluation.evaluate import Sampling, answer_all, by_source, write_generations
from gpg_megatron.evaluation.metrics import Estimate, powers_of_two
from gpg_megatron.types import Prompt, ScoredGroup

RESULT_FILE = "eval.json"
GENERATIONS_FILE = "generations.jsonl"


@exit_codes
def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 done, 2 bad input (one line on stderr), 1 an engine failed."""
    args = _parser().parse_args(argv)
    _check(args)
    config = _config(args)
    prompts, n_filtered = _prompts(args, config)
    from gpg_megatron.reward.sources import check_prompts
    from gpg_megatron.rollout.failures import EngineError

    check_prompts(prompts, config.reward)
    print(f"{len(prompts)} problems, {n_filtered} left out because they are too long", flush=True)
    try:
        result = _run(args, config, prompts)
    except (EngineError, TimeoutError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    path = Path(args.out) / RESULT_FILE
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print("\n".join(_table(result["sets"])))
    print(f"{path}, {Path(args.out) / GENERATIONS_FILE}")
    return 0


def _run(args: argparse.Namespace, config: Config, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Start the engines, answer, score; leave nothing of it behind."""
    from gpg_megatron.bridge.protocol import RECEIVER
    from gpg_megatron.host.device import resolve_device
    from gpg_megatron.host.reaper import cleanup_run, new_run_id, scratch_directory, start_reaper
    from gpg_megatron.reward.pool import RewardPool
    from gpg_megatron.rollout.fleet import Fleet

    device = resolve_device(args.device)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / GENERATIONS_FILE).unlink(missing_ok=True)
    run_id = new_run_id()
    start_reaper(run_id)
    fleet = None
    try:
        fleet = Fleet.start(
            model_path=str(Path(args.model).resolve()),
            config=config.rollout,
            device=device,
            max_model_len=args.max_prompt_length + args.max_response_length,
            run_id=run_id,
            worker_extension=RECEIVER,
            weight_transfer=None,
            scratch_dir=scratch_directory(run_id),
            log_dir=out / "logs",
        )
        with closing(RewardPool(config.reward)) as pool:
            fleet.wait_ready()
            sets = _answer(args, fleet, pool, prompts)
    finally:
        if fleet is not None:
            fleet.close()
        cleanup_run(run_id)
    return {"arguments": vars(args), "sets": sets}


def _answer(
    args: argparse.Namespace, fleet: Any, pool: Any, prompts: Sequence[Prompt]
) -> dict[str, Any]:
    """data_source -> mode -> {problems, metrics}."""
    sampled = Sampling(
        n=args.n,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        max_tokens=args.max_response_length,
        stop=(),
        seed=args.seed,
    )
    modes = {"sampled" if args.temperature else "greedy": sampled}
    if args.greedy:
        modes["greedy"] = replace(sampled, n=1, temperature=0.0, top_p=1.0, top_k=-1)
    sets: dict[str, Any] = {}
    for mode, sampling in modes.items():
        groups = answer_all(fleet, pool, prompts, sampling)
        write_generations(Path(args.out) / GENERATIONS_FILE, groups, mode=mode)
        for source, estimates in by_source(groups, powers_of_two(sampling.n)).items():
            sets.setdefault(source, {})[mode] = _summary(groups, source, estimates)
    return sets


def _summary(
    groups: Sequence[ScoredGroup], source: str, estimates: dict[str, Estimate]
) -> dict[str, Any]:
    mine = [group for group in groups if group.prompt.data_source == source]
    completions = [c for group in mine for c in group.completions]
    return {
        "problems": len(mine),
        "tokens_mean": sum(len(c.token_ids) for c in completions) / len(completions),
        "clipped_fraction": sum(c.finish_reason == "length" for c in completions)
        / len(completions),
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
    return lines


# ---- problems -------------------------------------------------------------------------------


def _prompts(args: argparse.Namespace, config: Config) -> tuple[list[Prompt], int]:
    """(prompts, how many were left out because they are too long)."""
    from transformers import AutoTokenizer

    from gpg_megatron.model.shape import load_model_shape

    shape = load_model_shape(args.model)
    longest = args.max_prompt_length + args.max_response_length
    if longest > shape.max_position_embeddings:
        raise UserError(
            f"--max-prompt-length + --max-response-length = {longest} is more than the model's "
            f"max_position_embeddings {shape.max_position_embeddings}"
        )
    tokenizer = AutoTokenizer.from_pretrained(args.model, local_files_only=True)
    prompts, n_filtered = [], 0
    for label, problems in _problems(args).items():
        rendered = render_all(problems, label, config.data, tokenizer)
        prompts += rendered
        n_filtered += len(problems) - len(rendered)
    if not prompts:
        raise UserError(f"all {n_filtered} prompts are longer than --max-prompt-length")
    return prompts, n_filtered


def _problems(args: argparse.Namespace) -> dict[str, list[Problem]]:
    """Name or file label -> its problems."""
    files = [x for x in args.data if x not in DATA_SETS]
    result = {
        label: read_problems(file)[: args.max_rows]
        for label, file in zip(file_labels(files), files, strict=True)
    }
    for name in (x for x in args.data if x in DATA_SETS):
        rows = load_split(name, args.source, "test", args.max_rows).rows
        result[name] = [parse_row(row, f"{name} row {i}") for i, row in enumerate(rows, start=1)]
    return result


# ---- arguments ------------------------------------------------------------------------------


def _config(args: argparse.Namespace) -> Config:
    rollout = RolloutConfig(
        num_engines=args.engines,
        tensor_model_parallel_size=args.tensor_parallel_size,
        dtype=args.dtype,
        gpu_memory_utilization=args.gpu_memory_utilization,
        kv_cache_gb=args.kv_cache_gb,
        max_num_seqs=args.max_num_seqs,
        max_response_length=args.max_response_length,
        enforce_eager=args.enforce_eager,
        generate_timeout_s=args.timeout,
    )
    return replace(
        Config(),
        model=ModelConfig(path=args.model),
        data=DataConfig(
            apply_chat_template=not args.no_chat_template,
            max_prompt_length=args.max_prompt_length,
            overlong_prompts="filter",
            system_prompt=args.system_prompt,
        ),
        rollout=rollout,
        reward=RewardConfig(scorer=args.scorer, num_workers=args.reward_workers),
    )


def _check(args: argparse.Namespace) -> None:
    """Raises UserError."""
    if args.temperature == 0 and args.n > 1:
        raise UserError(f"--n {args.n} with --temperature 0: all answers would be the same")
    if args.temperature == 0 and args.greedy:
        raise UserError("--greedy with --temperature 0: the answers are greedy already")
    for name in args.data:
        if name not in DATA_SETS and not Path(name).is_file():
            raise UserError(f"--data {name}: no such file, and no data set; known: {_names()}")


def _names() -> str:
    return ", ".join(DATA_SETS)


def _number(kind: type, test: Callable[[Any], bool], right: str) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        value = kind(text)
        if not test(value):
            raise argparse.ArgumentTypeError(f"{text} is not {right}")
        return value

    parse.__name__ = kind.__name__
    return parse


def _parser() -> argparse.ArgumentParser:
    positive = _number(int, lambda v: v >= 1, "at least 1")
    share = _number(float, lambda v: 0 < v <= 1, "greater than 0 and at most 1")
    heat = _number(float, lambda v: v >= 0, "at least 0")
    volume = _number(float, lambda v: v > 0, "greater than 0")
    parser = argparse.ArgumentParser(prog="gpg-eval", description=__doc__)
    add = parser.add_argument
    add("--model", required=True, metavar="DIR", help="a Hugging Face directory")
    add("--data", required=True, nargs="+", help=f"files in the row schema, or names: {_names()}")
    add("--source", help="local file or folder for the names; without it, Hugging Face")
    add("--out", required=True, metavar="DIR", help="where results and generations are written")
    add("--max-rows", type=positive, help="only the first N problems of each")
    add("--n", type=positive, default=1, help="answers to each problem (default 1)")
    add("--temperature", type=heat, default=1.0, help="0: greedy (default 1)")
    add("--top-p", type=share, default=1.0)
    add("--top-k", type=int, default=-1, help="-1: all tokens (default)")
    add("--greedy", action="store_true", help="also one greedy answer to each problem")
    add("--seed", type=int, default=1)
    add("--max-prompt-length", type=positive, default=1024, help="tokens; longer: left out")
    add("--max-response-length", type=positive, default=1024, help="tokens")
    add("--system-prompt", help="system message of problems that have none")
    add("--no-chat-template", action="store_true", help="join the messages as they are")
    add("--scorer", default="auto", choices=["auto", "exact_match", "gsm8k", "math", "math_verify"])
    add("--reward-workers", type=positive, default=1, help="scoring processes")
    add("--device", default="auto", choices=["auto", "cpu", "cuda"])
    add("--dtype", default="bf16", choices=["bf16", "fp32"])
    add("--engines", type=positive, default=1, help="vLLM engines")
    add("--tensor-parallel-size", type=positive, default=1, help="of each engine")
    add("--gpu-memory-utilization", type=share, default=0.9)
    add("--kv-cache-gb", type=volume, default=1.0, help="key-value cache on CPU, GiB")
    add("--max-num-seqs", type=positive, default=256, help="sequences decoded at once")
    add("--enforce-eager", action="store_true", help="no compilation, no graph capture")
    add("--timeout", type=positive, default=36000, help="seconds for all answers of one mode")
    return parser


if __name__ == "__main__":
    sys.exit(main())
