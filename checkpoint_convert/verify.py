"""Compare a Hugging Face directory with a Megatron checkpoint: every element, then log-probs.

    python -m checkpoint_convert.verify --hf DIR --megatron DIR [--no-logprobs]

The log-probs of fixed prompts come from transformers on one side and from Megatron's model,
which loads the checkpoint as training does, on the other; both models are held in memory.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from checkpoint_convert.console import progress_bar
from gpg_megatron.checkpoint.compare import compare
from gpg_megatron.checkpoint.conversion import hf_bytes
from gpg_megatron.errors import exit_codes

PROMPT_TOKENS = 32
N_PROMPTS = 4
LOGPROB_TOLERANCE = {torch.float32: 1e-4}
DEFAULT_TOLERANCE = 0.25
"""Nats, for types of 16 bits."""


@exit_codes
def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 equal, 1 not equal, 2 bad input (one line on stderr)."""
    args = _parser().parse_args(argv)
    with progress_bar("comparing", hf_bytes(args.hf)) as progress:
        result = compare(args.hf, args.megatron, progress=progress)
    print(f"{result.n_equal} of {result.n_tensors} tensors are equal, element by element")
    if result.first_difference:
        print(f"first difference: {result.first_difference}", file=sys.stderr)
        return 1
    if args.no_logprobs:
        return 0
    gap, tolerance = _logprob_gap(args.hf, args.megatron)
    print(
        f"log-probs of {N_PROMPTS} prompts of {PROMPT_TOKENS} tokens differ by at most "
        f"{gap:.1e} (limit {tolerance:g})"
    )
    return 0 if gap <= tolerance else 1


def _logprob_gap(hf: Path, megatron: Path) -> tuple[float, float]:
    """(largest |difference|, what is accepted), in nats."""
    from checkpoint_convert.logprobs import hf_logprobs, megatron_logprobs, prompts

    ids = prompts(hf, N_PROMPTS, PROMPT_TOKENS)
    right, dtype = hf_logprobs(hf, ids)
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))
    found = megatron_logprobs(megatron, ids, dtype)
    tolerance = LOGPROB_TOLERANCE.get(dtype, DEFAULT_TOLERANCE)
    return (found - right).abs().max().item(), tolerance


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="verify", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--hf", type=Path, required=True, metavar="DIR")
    parser.add_argument("--megatron", type=Path, required=True, metavar="DIR")
    parser.add_argument(
        "--no-logprobs", action="store_true", help="compare the tensors only; needs little memory"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
