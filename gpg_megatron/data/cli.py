"""gpg-data: writes the splits of a data set as parquet in the row schema, and what is odd."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gpg_megatron import __version__
from gpg_megatron.data import arithmetic
from gpg_megatron.data.catalog import DATA_SETS, Loaded, load_split
from gpg_megatron.data.checks import examine
from gpg_megatron.data.schema import write_parquets
from gpg_megatron.errors import UserError, exit_codes

CHECKS_FILE = "checks.json"


@exit_codes
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit code: 0 done, 2 bad input (one line on stderr)."""
    args = _parser().parse_args(argv)
    args.run(args)
    return 0


def _arithmetic(args: argparse.Namespace) -> None:
    split = arithmetic.draw(
        args.task, seed=args.seed, train_size=args.train_size, test_size=args.test_size
    )
    rows = {
        "train": arithmetic.rows(args.task, "train", split.train),
        "test": arithmetic.rows(args.task, "test", split.test),
    }
    _write(Path(args.out), rows)


def _named(args: argparse.Namespace) -> None:
    limits = {"train": args.train_size, "test": args.test_size}
    for name, limit in limits.items():
        if limit is not None and limit < 1:
            raise UserError(f"--{name}-size is {limit}; expected at least 1")
    splits = [args.split] if args.split else list(DATA_SETS[args.name].splits)
    if len(splits) > 1 and args.source is not None and Path(args.source).is_file():
        raise UserError(f"--source {args.source} is one file; expected --split train or test too")
    loaded = {x: load_split(args.name, args.source, x, limits[x]) for x in splits}
    _write(Path(args.out), {split: part.rows for split, part in loaded.items()})
    _check(Path(args.out), loaded)


def _write(out: Path, splits: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    files = {out / f"{split}.parquet": rows for split, rows in splits.items()}
    write_parquets(files)
    for path, rows in files.items():
        print(f"{path}: {len(rows)} rows")


def _check(out: Path, loaded: Mapping[str, Loaded]) -> None:
    findings = examine(loaded)
    path = out / CHECKS_FILE
    path.write_text(json.dumps(findings.to_json(), indent=1) + "\n", encoding="utf-8")
    lines = findings.lines()
    print("\n".join([*lines, f"all of them: {path}"]) if lines else f"{path}: nothing odd")


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--out", required=True, help="folder for the parquet files")
    parser = argparse.ArgumentParser(prog="gpg-data", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="DATASET")

    sub = commands.add_parser("arithmetic", help="generated problems", parents=[common])
    tasks = "; ".join(f"{name}: {task.description}" for name, task in arithmetic.TASKS.items())
    sub.add_argument("--task", choices=list(arithmetic.TASKS), default="add", help=tasks)
    sub.add_argument("--seed", type=int, default=1)
    sub.add_argument("--train-size", type=int, default=4096, help="problems (default 4096)")
    sub.add_argument("--test-size", type=int, default=512, help="problems (default 512)")
    sub.set_defaults(run=_arithmetic)

    for name, data_set in DATA_SETS.items():
        where = f"{data_set.hub}: {', '.join(data_set.splits)}"
        sub = commands.add_parser(name, help=where, parents=[common])
        sub.add_argument("--source", help="local file or folder; without it, Hugging Face")
        sub.add_argument("--split", choices=list(data_set.splits), help="only this one")
        sub.add_argument("--train-size", type=int, help="first N records (default all)")
        sub.add_argument("--test-size", type=int, help="first N records (default all)")
        sub.set_defaults(run=_named, name=name)
    return parser


if __name__ == "__main__":
    sys.exit(main())
