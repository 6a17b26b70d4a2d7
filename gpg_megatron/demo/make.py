"""The demo's model and data, made from nothing: python -m gpg_megatron.demo.make --out DIR

    DIR/model/          a Qwen2 directory as Hugging Face writes it, with its tokenizer
    DIR/train.parquet   problems for training
    DIR/test.parquet    held-out problems; the warm-up never saw them
    DIR/demo.json       settings and pass rate

What the model is: about a million parameters, initialised at random and warmed up for a
minute on one task, the largest of three numbers. What the warm-up does: first it teaches the
task with right answers, so that the network can tell the largest number. Then it goes on with
texts as they are found in the wild, where the answer is right in some 30 % of the cases and
otherwise a plausible slip: another operand, off by one, off by ten. So the model knows the
answer but, sampled at temperature 1, gives it about every third time. That is where
reinforcement learning starts; it has an ability to sharpen, as with a pretrained model. It is
a demonstration of the machinery, not of a capable model.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from gpg_megatron import __version__
from gpg_megatron.demo.settings import TASK, DemoSettings
from gpg_megatron.errors import UserError, exit_codes

MARKER = "demo.json"


def make_demo(out: Path, settings: DemoSettings) -> bool:
    """Make the demo folder unless out holds it already. Returns whether it was made.

    The folder gets its name when everything is in it.

    Raises:
        UserError: out exists and is something else, or was made with other settings, or
            cannot be written.
    """
    if _is_made(out, settings):
        return False
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        part.mkdir(parents=True)
        _fill(part, settings)
        os.replace(part, out)
    except OSError as error:
        raise UserError(f"{error.filename or out}: cannot write: {error.strerror}") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return True


def _fill(folder: Path, settings: DemoSettings) -> None:
    # Imported here: torch and transformers take seconds, and a folder that is there already
    # needs neither.
    from transformers.utils.logging import disable_progress_bar

    from gpg_megatron.data import arithmetic
    from gpg_megatron.data.schema import write_parquets
    from gpg_megatron.demo import model as demo_model

    disable_progress_bar()
    split = arithmetic.draw(
        TASK,
        seed=settings.seed,
        train_size=settings.warmup_steps * settings.batch_size,
        test_size=settings.test_rows,
    )
    model, tokenizer = demo_model.train(split.train, settings)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    train = split.train[: settings.train_rows]
    parts = {"train": train, "test": split.test}
    write_parquets(
        {folder / f"{name}.parquet": arithmetic.rows(TASK, name, x) for name, x in parts.items()}
    )
    record = {
        "settings": dataclasses.asdict(settings),
        "pass_rate": demo_model.pass_rate(model, tokenizer, split.test),
    }
    (folder / MARKER).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _is_made(out: Path, settings: DemoSettings) -> bool:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    marker = out / MARKER
    if not marker.is_file():
        raise UserError(f"{out} exists and holds no demo; expected a new or empty folder")
    made_with = json.loads(marker.read_text(encoding="utf-8"))["settings"]
    if made_with != dataclasses.asdict(settings):
        raise UserError(
            f"{out} holds a demo made with other settings (seed {made_with['seed']}); "
            "expected the same settings: choose another folder or remove this one"
        )
    return True


@exit_codes
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit code: 0 done, 2 bad input (one line on stderr)."""
    parser = argparse.ArgumentParser(
        prog="python -m gpg_megatron.demo.make",
        description="Makes the demo's model and data, once.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("--out", required=True, type=Path, help="folder of the model and the data")
    parser.add_argument("--seed", type=int, default=DemoSettings.seed)
    args = parser.parse_args(argv)
    start = time.monotonic()
    made = make_demo(args.out, DemoSettings(seed=args.seed))
    rate = json.loads((args.out / MARKER).read_text(encoding="utf-8"))["pass_rate"]
    how = f"made in {time.monotonic() - start:.0f} s" if made else "already there"
    print(f"{args.out}: demo model {how}; held-out pass rate at temperature 1: {rate:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
