"""Whether the scorers are right, and how fast they are.

    python -m benchmarks.scoring [--per-way N] [--laid-aside] [--scorers math ...]

Every pair of an answer and a truth is made from a value that is known (benchmarks/spelling), so
its label does not depend on any scorer. A third of the ways of spelling is laid aside while the
scorers are worked on; --laid-aside reports it, alone. math-verify's own defaults are reported
beside ours.

The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Sequence

from benchmarks.spelling.tables import grade_school, mathematical
from benchmarks.spelling.ways import Pair
from gpg_megatron.reward.scorers import PREPARE, SCORERS

SEED = 20261125

Judge = Callable[[str, str], bool]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--per-way", type=int, default=8, help="pairs for each way (default 8)")
    parser.add_argument("--laid-aside", action="store_true", help="the third that was laid aside")
    parser.add_argument("--scorers", nargs="+", default=list(JUDGES), choices=list(JUDGES))
    parser.add_argument("--show", type=int, default=0, help="wrong verdicts to show for each kind")
    args = parser.parse_args()
    summary: dict[str, float] = {}
    for name in args.scorers:
        source = grade_school if name == "gsm8k" else mathematical
        chosen = [p for p in source(args.per_way, SEED) if p.laid_aside == args.laid_aside]
        summary |= report(name, JUDGES[name](), chosen, args.show)
    print(json.dumps(summary))


def report(name: str, judge: Judge, chosen: Sequence[Pair], shown: int) -> dict[str, float]:
    """Print one line for each kind; the shares and the speed over all of them."""
    by_kind: dict[str, list[Pair]] = defaultdict(list)
    for pair in chosen:
        by_kind[pair.kind].append(pair)
    missed: list[Pair] = []
    fooled: list[Pair] = []
    total = 0.0
    for kind, of_kind in by_kind.items():
        begin = time.process_time()
        verdicts = [judge(pair.response, pair.truth) for pair in of_kind]
        seconds = time.process_time() - begin
        total += seconds
        wrong = [p for p, right in zip(of_kind, verdicts, strict=True) if right != p.right]
        wrongly_0 = [p for p in wrong if p.right]
        wrongly_1 = [p for p in wrong if not p.right]
        missed += wrongly_0
        fooled += wrongly_1
        n_right = sum(p.right for p in of_kind)
        print(
            f"{name:12} {kind:11} right {n_right:5} wrongly_0 {len(wrongly_0):4}  "
            f"wrong {len(of_kind) - n_right:5} wrongly_1 {len(wrongly_1):4}  "
            f"answers/s {len(of_kind) / seconds:8.0f}"
        )
        for pair in list({p.way: p for p in wrong}.values())[:shown]:
            print(f"    {'wrongly_0' if pair.right else 'wrongly_1'} {pair}")
    n_right = sum(p.right for p in chosen)
    short = {"math_verify": "verify"}.get(name, name)
    return {
        f"{short}_wrongly_0": round(len(missed) / n_right, 4),
        f"{short}_wrongly_1": round(len(fooled) / (len(chosen) - n_right), 4),
        f"{short}_pairs": len(chosen),
        f"{short}_answers_per_s": round(len(chosen) / total),
    }


def ours(name: str) -> Judge:
    """A scorer of gpg_megatron."""
    if name in PREPARE:
        PREPARE[name]()
    scorer = SCORERS[name]
    return lambda response, truth: scorer(response, truth).accuracy == 1.0


def library() -> Judge:
    """math-verify as its authors set it."""
    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)

    def judge(response: str, truth: str) -> bool:
        target = parse(f"\\boxed{{{truth}}}", parsing_timeout=None)
        return bool(verify(target, parse(response, parsing_timeout=None), timeout_seconds=None))

    return judge


JUDGES: dict[str, Callable[[], Judge]] = {
    "math": lambda: ours("math"),
    "math_verify": lambda: ours("math_verify"),
    "gsm8k": lambda: ours("gsm8k"),
    "library": library,
}


if __name__ == "__main__":
    main()
