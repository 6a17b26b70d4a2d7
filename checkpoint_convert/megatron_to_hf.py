"""Megatron-Core checkpoint -> Hugging Face directory for transformers and vLLM.

    python -m checkpoint_convert.megatron_to_hf --megatron DIR --hf DIR [--dtype bf16]

The checkpoint may be a converted one or one that training saved, of any layout.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from checkpoint_convert.console import CASTS, progress_bar, say_done
from gpg_megatron.checkpoint.to_hf import megatron_to_hf, model_bytes
from gpg_megatron.errors import exit_codes


@exit_codes
def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 done, 2 bad input (one line on stderr)."""
    begin = time.perf_counter()
    args = _parser().parse_args(argv)
    dtype = CASTS.get(args.dtype)
    with progress_bar("to Hugging Face", model_bytes(args.megatron, dtype)) as progress:
        result = megatron_to_hf(args.megatron, args.hf, dtype=dtype, progress=progress)
    say_done(result, args.hf, begin)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megatron_to_hf", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument(
        "--megatron", type=Path, required=True, metavar="DIR", help="a complete checkpoint"
    )
    parser.add_argument(
        "--hf", type=Path, required=True, metavar="DIR", help="new or empty directory"
    )
    parser.add_argument("--dtype", choices=list(CASTS), help="cast all tensors; default: keep")
    return parser


if __name__ == "__main__":
    sys.exit(main())
