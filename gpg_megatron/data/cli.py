"""gpg-data: writes train.parquet and test.parquet in the row schema."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpg_megatron.console import exit_codes
from gpg_megatron.data import arithmetic, gsm8k
from gpg_megatron.data.schema import write_parquets
from gpg_megatron.errors import UserError


@exit_codes
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit code: 0 done, 2 bad input (one line on stderr)."""
    args = _parser().parse_args(argv)
    splits = args.make(args)
    files = {Path(args.out) / f"{name}.parquet": rows for name, rows in splits.items()}
    write_parquets(files)
    for path, rows in files.items():
        print(f"{path}: {len(rows)} rows")
    return 0


def _arithmetic(args: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    split = arithmetic.draw(
        args.task, seed=args.seed, train_size=args.train_size, test_size=args.test_size
    )
    return {
        "train": arithmetic.rows(args.task, "train", split.train),
        "test": arithmetic.rows(args.task, "test", split.test),
    }


def _gsm8k(args: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    limits = {"train": args.train_size, "test": args.test_size}
    for name, limit in limits.items():
        if limit is not None and limit < 1:
            raise UserError(f"--{name}-size is {limit}; expected at least 1")
    return {split: gsm8k.load_rows(args.source, split, limits[split]) for split in gsm8k.SPLITS}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gpg-data", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="DATASET")

    sub = commands.add_parser("arithmetic", help="generated problems")
    tasks = "; ".join(f"{name}: {task.description}" for name, task in arithmetic.TASKS.items())
    sub.add_argument("--task", choices=list(arithmetic.TASKS), default="add", help=tasks)
    sub.add_argument("--seed", type=int, default=1)
    sub.add_argument("--train-size", type=int, default=4096, help="problems (default 4096)")
    sub.add_argument("--test-size", type=int, default=512, help="problems (default 512)")
    sub.set_defaults(make=_arithmetic)
    _add_out(sub)

    sub = commands.add_parser("gsm8k", help="grade-school word problems")
    sub.add_argument("--source", help="local folder; without it, Hugging Face openai/gsm8k")
    sub.add_argument("--train-size", type=int, help="first N rows (default all)")
    sub.add_argument("--test-size", type=int, help="first N rows (default all)")
    sub.set_defaults(make=_gsm8k)
    _add_out(sub)
    return parser


def _add_out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", required=True, help="folder for train.parquet and test.parquet")


if __name__ == "__main__":
    sys.exit(main())
