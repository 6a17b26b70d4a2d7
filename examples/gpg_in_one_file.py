"""The whole of GPG, Group Policy Gradient (arXiv 2504.02546), in one file and one process.

    A_i  = alpha * (r_i - mean of r over the group)              alpha = B / (B - M)
    loss = - mean over questions of  sum_i sum_t A_i log pi(o_it | q, o_i<t) / sum_i |o_i|

In each step the model pi samples a group of G answers o_1 .. o_G to each of Q questions q.
Answer i has |o_i| tokens and is right (r_i = 1) or wrong (r_i = 0). A group whose answers are
all right, or all wrong, is dead: its advantages A are 0, yet it counts in the mean. alpha makes
up for that: of the B = Q G answers of the step, M are in dead groups.

That is all. There is no critic, no reference model, no KL term, no ratio and no clipped ratio:
every answer is used for one update, by the model that sampled it.

    python -m gpg_megatron.demo.make --out runs/demo_model
    python examples/gpg_in_one_file.py --model runs/demo_model/model \\
        --data runs/demo_model/train.parquet

Shape legend: Q questions, G answers to each, L tokens of the longest answer of a group.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

Tokens = list[int]
MAX_GRAD_NORM = 1.0


@dataclass(frozen=True)
class Question:
    """One problem, ready for the model."""

    prompt: Tokens
    truth: str


def read_questions(path: Path, tokenizer: Any) -> list[Question]:
    """The rows of a jsonl or parquet file, each {"prompt": messages, "reward_model": {...}}."""
    if path.suffix == ".parquet":
        from pyarrow.parquet import read_table

        rows = read_table(path).to_pylist()
    else:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").strip().split("\n")]
    return [
        Question(
            tokenizer.apply_chat_template(
                row["prompt"], add_generation_prompt=True, return_dict=False
            ),
            str(row["reward_model"]["ground_truth"]),
        )
        for row in rows
    ]


@torch.no_grad()
def sample(
    model: Any, tokenizer: Any, prompts: Sequence[Tokens], n_answers: int, max_tokens: int
) -> list[list[Tokens]]:
    """A group of answers to each prompt; each answer ends with its end-of-text token, or is cut."""
    padded = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
    rows = model.generate(
        **padded.to(model.device),
        num_return_sequences=n_answers,
        max_new_tokens=max_tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        # From pi itself: a model directory may come with other settings.
        do_sample=True,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        repetition_penalty=1.0,
    )[:, padded["input_ids"].shape[1] :].tolist()
    answers = [until_end(row, tokenizer.eos_token_id) for row in rows]
    return [answers[i : i + n_answers] for i in range(0, len(answers), n_answers)]


def until_end(tokens: Tokens, end: int) -> Tokens:
    """The tokens up to the first end-of-text token, which is part of the answer."""
    return tokens[: tokens.index(end) + 1] if end in tokens else tokens


def score(tokenizer: Any, answers: Sequence[Tokens], truth: str) -> list[float]:
    """1.0 for each answer whose text is the truth, else 0.0."""
    texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
    return [float(text.strip() == truth.strip()) for text in texts]


def advantages(rewards_QG: Tensor) -> tuple[Tensor, float]:
    """A [Q, G] and alpha, from the rewards [Q, G]; without a live group both are 0."""
    live_Q = rewards_QG.amax(1) > rewards_QG.amin(1)
    n_live = int(live_Q.sum())
    alpha = len(live_Q) / n_live if n_live else 0.0  # B / (B - M): all groups have G answers
    centred_QG = rewards_QG - rewards_QG.mean(1, keepdim=True)
    return alpha * centred_QG * live_Q[:, None], alpha


def loss(model: Any, prompt: Tokens, answers: Sequence[Tokens], advantages_G: Tensor) -> Tensor:
    """- sum_i sum_t A_i log pi(o_it | q, o_i<t) / sum_i |o_i| of one group; a scalar."""
    answers_GL = pad_sequence([torch.tensor(answer) for answer in answers], batch_first=True)
    lengths_G = torch.tensor([len(answer) for answer in answers])
    mask_GL = (torch.arange(answers_GL.shape[1]) < lengths_G[:, None]).to(model.device)
    prompts_GP = torch.tensor(prompt).expand(len(answers), -1)
    # The padding stands at the end, where no token of an answer attends to it.
    tokens = torch.cat([prompts_GP, answers_GL], 1).to(model.device)
    # The logits at each position are those of the next token.
    logits_GLV = model(tokens).logits[:, len(prompt) - 1 : -1].float()
    targets_GL = tokens[:, len(prompt) :]
    logprobs_GL = -cross_entropy(logits_GLV.transpose(1, 2), targets_GL, reduction="none")
    weighted_GL = advantages_G.to(model.device)[:, None] * logprobs_GL * mask_GL
    return -weighted_GL.sum() / mask_GL.sum()


def update(
    model: Any,
    optimizer: torch.optim.Optimizer,
    prompts: Sequence[Tokens],
    answers: Sequence[Sequence[Tokens]],
    advantages_QG: Tensor,
) -> float:
    """One optimizer step over Q groups; returns the loss. Without a live group nothing changes."""
    optimizer.zero_grad()
    total = 0.0
    for prompt, group, advantages_G in zip(prompts, answers, advantages_QG, strict=True):
        if advantages_G.any():  # a dead group adds exactly nothing: no need to compute it
            part = loss(model, prompt, group, advantages_G) / len(prompts)
            part.backward()
            total += part.item()
    if advantages_QG.any():
        clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
    return total


def make_optimizer(model: Any, lr: float, eps: float = 1e-8) -> torch.optim.Optimizer:
    """AdamW without weight decay."""
    return torch.optim.AdamW(
        model.parameters(), lr=lr, betas=(0.9, 0.999), eps=eps, weight_decay=0.0
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Train, and print a line for each step."""
    parser = argparse.ArgumentParser(description="GPG in one file.")
    parser.add_argument("--model", required=True, help="Hugging Face directory")
    parser.add_argument("--data", required=True, type=Path, help="jsonl or parquet file")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--prompts", type=int, default=64, help="Q, questions in each step")
    parser.add_argument("--samples", type=int, default=8, help="G, answers to each question")
    parser.add_argument("--max-tokens", type=int, default=4, help="limit of an answer")
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(argv)

    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model: Any = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    optimizer = make_optimizer(model, args.lr)
    questions = read_questions(args.data, tokenizer)

    for step in range(1, args.steps + 1):
        batch = rng.sample(questions, args.prompts)
        prompts = [question.prompt for question in batch]
        answers = sample(model, tokenizer, prompts, args.samples, args.max_tokens)
        rewards_QG = torch.tensor(
            [score(tokenizer, group, q.truth) for group, q in zip(answers, batch, strict=True)]
        )
        advantages_QG, alpha = advantages(rewards_QG)
        value = update(model, optimizer, prompts, answers, advantages_QG)
        print(
            f"step {step:>3}  accuracy {rewards_QG.mean():.3f}  "
            f"live {advantages_QG.any(1).float().mean():.2f}  alpha {alpha:.2f}  loss {value:+.4f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
