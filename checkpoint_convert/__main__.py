"""gpg-convert: a Hugging Face directory to a Megatron-Core checkpoint (torch_dist), and back.

    gpg-convert hf-to-megatron --hf DIR --megatron DIR [--tp N --pp N --ep N] [--dtype bf16]
    gpg-convert megatron-to-hf --megatron DIR --hf DIR [--dtype bf16]
    gpg-convert verify --hf DIR --megatron DIR [--no-logprobs]

Any layout can load what hf-to-megatron writes: --tp, --pp and --ep only decide how the files are
split and how far the vocabulary is padded. megatron-to-hf also takes what training saved.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn

from gpg_megatron import __version__
from gpg_megatron.checkpoint import conversion
from gpg_megatron.checkpoint.compare import compare
from gpg_megatron.checkpoint.to_hf import megatron_to_hf
from gpg_megatron.checkpoint.to_megatron import hf_to_megatron
from gpg_megatron.config.sections import Config, ModelConfig, PolicyConfig
from gpg_megatron.errors import UserError, exit_codes
from gpg_megatron.layout.topology import PolicyGrid, policy_grid
from gpg_megatron.model.layout_rules import check_policy_layout
from gpg_megatron.model.shape import load_model_shape, shape_warnings
from gpg_megatron.types import DTYPES

CASTS = {**DTYPES, "fp16": torch.float16}
"""--dtype -> what tensors are cast to."""
PROMPT_TOKENS = 32
N_PROMPTS = 4
LOGPROB_TOLERANCE = {torch.float32: 1e-4}
DEFAULT_TOLERANCE = 0.25
"""Nats, for types of 16 bits."""


@exit_codes
def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 done, 1 not equal, 2 bad input (one line on stderr)."""
    args = _parser().parse_args(argv)
    if args.command == "verify":
        return _verify(args)
    begin = time.perf_counter()
    dtype = CASTS.get(args.dtype)
    if args.command == "hf-to-megatron":
        target, grid = args.megatron, _grid(args)
        for line in shape_warnings(args.hf):
            print(f"warning: {line}", file=sys.stderr)
        with _progress_bar("to Megatron") as progress:
            done = hf_to_megatron(args.hf, target, grid=grid, dtype=dtype, progress=progress)
    else:
        target = args.hf
        with _progress_bar("to Hugging Face") as progress:
            done = megatron_to_hf(args.megatron, target, dtype=dtype, progress=progress)
    seconds = time.perf_counter() - begin
    print(
        f"{target}: {done.n_tensors} tensors, {done.n_bytes / 1e9:.2f} GB in {seconds:.1f} s "
        f"({done.n_bytes / 1e9 / seconds:.2f} GB/s)"
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gpg-convert", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in (
        ("hf-to-megatron", "write a Megatron checkpoint, which any layout can load"),
        ("megatron-to-hf", "write a directory for transformers and vLLM"),
        ("verify", "compare every element of the two, then log-probs"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        for side, what in (("--hf", "Hugging Face directory"), ("--megatron", "checkpoint")):
            new = "; must be new or empty" if name.endswith(f"to{side[1:]}") else ""
            command.add_argument(side, type=Path, required=True, metavar="DIR", help=what + new)
        if name == "verify":
            text = "compare the tensors only; needs little memory"
            command.add_argument("--no-logprobs", action="store_true", help=text)
            continue
        text = "cast all tensors; default: keep"
        command.add_argument("--dtype", choices=list(CASTS), help=text)
        if name == "hf-to-megatron":
            for size, text in (
                ("--tp", "tensor-parallel ranks"),
                ("--pp", "pipeline stages"),
                ("--ep", "expert-parallel ranks"),
            ):
                command.add_argument(size, type=int, default=1, metavar="N", help=text)
    return parser


def _grid(args: argparse.Namespace) -> PolicyGrid:
    for name in ("tp", "pp", "ep"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} is {getattr(args, name)}; expected at least 1")
    shape = load_model_shape(args.hf, may_be_fp8=True)
    policy = PolicyConfig(
        tensor_model_parallel_size=args.tp,
        pipeline_model_parallel_size=args.pp,
        expert_model_parallel_size=args.ep,
        data_parallel_size=args.ep,
    )
    check_policy_layout(Config(model=ModelConfig(path=str(args.hf)), policy=policy), shape)
    return policy_grid(policy, shape)


@contextmanager
def _progress_bar(title: str) -> Iterator[conversion.Progress]:
    """A bar on stderr for the block."""
    columns = ("{task.description}", BarColumn(), DownloadColumn(), TransferSpeedColumn())
    console = Console(file=sys.stderr)
    with Progress(*columns, console=console, transient=not console.is_terminal) as bar:
        task = bar.add_task(title, total=None)
        yield lambda n, total: bar.update(task, advance=n, total=total)


def _verify(args: argparse.Namespace) -> int:
    """The log-probs of fixed prompts come from transformers on one side and from Megatron's model,
    which loads the checkpoint as training does, on the other; both models are held in memory."""
    with _progress_bar("comparing") as progress:
        equal = compare(args.hf, args.megatron, progress=progress)
    print(f"{sum(equal.values())} of {len(equal)} tensors are equal, element by element")
    if different := [name for name in sorted(equal) if not equal[name]]:
        print(f"first difference: {different[0]}", file=sys.stderr)
        return 1
    if args.no_logprobs:
        return 0
    from checkpoint_convert.logprobs import hf_logprobs, megatron_logprobs, prompts

    ids = prompts(args.hf, N_PROMPTS, PROMPT_TOKENS)
    right, dtype = hf_logprobs(args.hf, ids)
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))
    found = megatron_logprobs(args.megatron, ids, dtype)
    same = found.isnan() & right.isnan()  # a model of NaN is still the same model
    gap = (found - right).masked_fill(same, 0.0).abs().max().item()
    tolerance = LOGPROB_TOLERANCE.get(dtype, DEFAULT_TOLERANCE)
    print(
        f"log-probs of {N_PROMPTS} prompts of {PROMPT_TOKENS} tokens differ by at most "
        f"{gap:.1e} (limit {tolerance:g})"
    )
    return 0 if gap <= tolerance else 1


if __name__ == "__main__":
    sys.exit(main())
