"""Hugging Face directory -> Megatron-Core checkpoint (torch_dist), which any layout can load.

    python -m checkpoint_convert.hf_to_megatron --hf DIR --megatron DIR [--tp N --pp N --ep N]
                                                [--dtype bf16]

The layout only decides how the files are split and how far the vocabulary is padded.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from checkpoint_convert.console import CASTS, progress_bar, say_done
from gpg_megatron.checkpoint.conversion import hf_bytes
from gpg_megatron.checkpoint.to_megatron import hf_to_megatron
from gpg_megatron.config.sections import Config, ModelConfig, PolicyConfig
from gpg_megatron.errors import UserError, exit_codes
from gpg_megatron.layout.topology import PolicyGrid, policy_grid
from gpg_megatron.model.layout_rules import check_policy_layout
from gpg_megatron.model.shape import load_model_shape, shape_warnings


@exit_codes
def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 done, 2 bad input (one line on stderr)."""
    begin = time.perf_counter()
    args = _parser().parse_args(argv)
    grid = _grid(args)
    for line in shape_warnings(args.hf):
        print(f"warning: {line}", file=sys.stderr)
    with progress_bar("to Megatron", hf_bytes(args.hf)) as progress:
        result = hf_to_megatron(
            args.hf, args.megatron, grid=grid, dtype=CASTS.get(args.dtype), progress=progress
        )
    say_done(result, args.megatron, begin)
    return 0


def _grid(args: argparse.Namespace) -> PolicyGrid:
    for name in ("tp", "pp", "ep"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} is {getattr(args, name)}; expected at least 1")
    shape = load_model_shape(args.hf)
    policy = PolicyConfig(
        tensor_model_parallel_size=args.tp,
        pipeline_model_parallel_size=args.pp,
        expert_model_parallel_size=args.ep,
        data_parallel_size=args.ep,
    )
    check_policy_layout(Config(model=ModelConfig(path=str(args.hf)), policy=policy), shape)
    return policy_grid(policy, shape)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hf_to_megatron", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--hf", type=Path, required=True, metavar="DIR", help="the model")
    parser.add_argument(
        "--megatron", type=Path, required=True, metavar="DIR", help="new or empty directory"
    )
    parser.add_argument("--tp", type=int, default=1, metavar="N", help="tensor-parallel ranks")
    parser.add_argument("--pp", type=int, default=1, metavar="N", help="pipeline stages")
    parser.add_argument("--ep", type=int, default=1, metavar="N", help="expert-parallel ranks")
    parser.add_argument("--dtype", choices=list(CASTS), help="cast all tensors; default: keep")
    return parser


if __name__ == "__main__":
    sys.exit(main())
