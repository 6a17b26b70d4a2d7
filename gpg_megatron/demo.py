"""The demo's model and data, made from nothing: python -m gpg_megatron.demo --out DIR

    DIR/model/          a Qwen2 directory as Hugging Face writes it, with its tokenizer
    DIR/train.parquet   problems for training
    DIR/test.parquet    held-out problems; the warm-up never saw them
    DIR/demo.json       the settings; written last

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
import random
import shutil
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from gpg_megatron.data import arithmetic
from gpg_megatron.data.schema import write_parquet
from gpg_megatron.errors import UserError

TASK = "largest"
PAD, BOS, EOS = "<|pad|>", "<|begin|>", "<|end|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
MARKER = "demo.json"


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """Everything that determines the result."""

    seed: int = 1
    hidden_size: int = 128
    intermediate_size: int = 512
    num_layers: int = 4
    num_heads: int = 4
    """Of size hidden_size / num_heads = 32, the smallest that vLLM's CPU attention takes."""
    num_kv_heads: int = 2
    max_vocab_size: int = 300
    """Not a multiple of 64 or 128: vocabulary padding is part of what the demo exercises."""
    warmup_steps: int = 400
    batch_size: int = 64
    """Texts per warm-up step; no text is seen twice."""
    lr: float = 1.5e-3
    right_phase: float = 0.6
    """Share of the warm-up steps with right answers only."""
    right_share: float = 0.28
    """Share of right answers in the rest."""
    train_rows: int = 4096
    test_rows: int = 300


def build_tokenizer(texts: Iterable[str], max_vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: any text encodes and decodes to itself; digits stay single."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=max_vocab_size,
        special_tokens=[PAD, BOS, EOS, *ROLES],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        additional_special_tokens=list(ROLES),
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def build_model(settings: DemoSettings, tokenizer: PreTrainedTokenizerFast) -> Qwen2ForCausalLM:
    """A randomly initialised fp32 Qwen2 with tied embeddings. Uses torch's global generator."""
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.num_layers,
        num_attention_heads=settings.num_heads,
        num_key_value_heads=settings.num_kv_heads,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        initializer_range=0.05,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        dtype="float32",
    )
    return Qwen2ForCausalLM(config).float()


def slip(operands: arithmetic.Operands, rng: random.Random) -> int:
    """A plausible wrong answer: another operand, off by one, off by ten; two digits."""
    right = max(operands)
    near = (right - 1, right + 1, right - 10, right + 10)
    return rng.choice([x for x in (*operands, *near) if x != right and 10 <= x <= 99])


def encode(
    tokenizer: PreTrainedTokenizerFast, texts: Sequence[tuple[arithmetic.Operands, int]]
) -> torch.Tensor:
    """int64 [N, P+3]: prompt, two digits, end-of-text. Every prompt has the same P tokens."""
    question = arithmetic.TASKS[TASK].question
    rows = [
        [
            {"role": "user", "content": question(operands)},
            {"role": "assistant", "content": str(answer)},
        ]
        for operands, answer in texts
    ]
    return torch.tensor(tokenizer.apply_chat_template(rows, return_dict=False))


def answer_logprobs(model: Qwen2ForCausalLM, ids_NT: torch.Tensor) -> torch.Tensor:
    """float32 [N, 3]: log-probability of the two digits and the end of each text."""
    hidden = model.model(ids_NT[:, :-1]).last_hidden_state[:, -3:]
    logits = model.lm_head(hidden)
    return -cross_entropy(logits.transpose(1, 2), ids_NT[:, -3:], reduction="none")


def warm_up(
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    problems: Sequence[arithmetic.Operands],
    settings: DemoSettings,
) -> None:
    """Supervised training in place, one pass over the problems."""
    assert len(problems) == settings.warmup_steps * settings.batch_size
    rng = random.Random(settings.seed)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    first_wild_step = round(settings.right_phase * settings.warmup_steps)
    for step in range(settings.warmup_steps):
        for group in optimizer.param_groups:
            rise, fall = step / 20, 1 - step / settings.warmup_steps
            group["lr"] = settings.lr * max(0.05, min(1, rise, fall))
        share = settings.right_share if step >= first_wild_step else 1.0
        batch = problems[step * settings.batch_size :][: settings.batch_size]
        texts = [(x, max(x) if rng.random() < share else slip(x, rng)) for x in batch]
        loss = -answer_logprobs(model, encode(tokenizer, texts)).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 50 == 0:
            print(f"warm-up {step + 1}/{settings.warmup_steps} loss {loss.item():.3f}", flush=True)


@torch.no_grad()
def pass_rate(
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    problems: Sequence[arithmetic.Operands],
) -> float:
    """Expected accuracy at temperature 1: the mean probability of the right answer."""
    ids = encode(tokenizer, [(x, max(x)) for x in problems])
    return answer_logprobs(model, ids).sum(1).exp().mean().item()


def make_demo(out: Path, settings: DemoSettings) -> bool:
    """Make the demo folder unless out holds it already. Returns whether it was made.

    Raises:
        UserError: out exists and is something else, or was made with other settings.
    """
    if _is_made(out, settings):
        return False
    torch.manual_seed(settings.seed)
    split = arithmetic.draw(
        TASK,
        seed=settings.seed,
        train_size=settings.warmup_steps * settings.batch_size,
        test_size=settings.test_rows,
    )
    tokenizer = build_tokenizer(_tokenizer_texts(split), settings.max_vocab_size)
    model = build_model(settings, tokenizer)
    warm_up(model, tokenizer, split.train, settings)
    rate = pass_rate(model, tokenizer, split.test)
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        model.save_pretrained(part / "model")
        tokenizer.save_pretrained(part / "model")
        train = split.train[: settings.train_rows]
        write_parquet(arithmetic.rows(TASK, "train", train), part / "train.parquet")
        write_parquet(arithmetic.rows(TASK, "test", split.test), part / "test.parquet")
        record = {"settings": dataclasses.asdict(settings), "pass_rate": rate}
        (part / MARKER).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        os.replace(part, out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return True


def _tokenizer_texts(split: arithmetic.Split) -> list[str]:
    return [arithmetic.TASKS[TASK].question(operands) for operands in split.train[:500]]


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
            "expected the same ones; choose another folder or remove this one"
        )
    return True


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit code: 0 done, 2 bad input (one line on stderr)."""
    parser = argparse.ArgumentParser(prog="python -m gpg_megatron.demo", description=main.__doc__)
    parser.add_argument("--out", required=True, type=Path, help="the demo folder")
    parser.add_argument("--seed", type=int, default=DemoSettings.seed)
    args = parser.parse_args(argv)
    start = time.monotonic()
    try:
        made = make_demo(args.out, DemoSettings(seed=args.seed))
    except UserError as error:
        print(f"gpg_megatron.demo: {error}", file=sys.stderr)
        return 2
    rate = json.loads((args.out / MARKER).read_text(encoding="utf-8"))["pass_rate"]
    how = f"made in {time.monotonic() - start:.0f} s" if made else "already there"
    print(f"{args.out}: demo model {how}; held-out pass rate at temperature 1: {rate:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
