"""The demo's tokenizer and model, and the warm-up that teaches it one task.

Shape legend: N texts, each of the same number of tokens, P of them the prompt's.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from gpg_megatron.data import arithmetic
from gpg_megatron.demo.settings import TASK, DemoSettings

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


def build_tokenizer(texts: Iterable[str], max_vocab_size: int) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer: any text encodes, digits stay single.

    The split into words is Qwen2's: AutoTokenizer gives every model of that architecture
    Qwen2's class, which brings its own split whatever tokenizer.json says.
    """
    plain = Qwen2Tokenizer().backend_tokenizer
    tokenizer = Tokenizer(BPE())
    tokenizer.normalizer, tokenizer.pre_tokenizer = plain.normalizer, plain.pre_tokenizer
    tokenizer.decoder = plain.decoder
    trainer = BpeTrainer(
        vocab_size=max_vocab_size,
        special_tokens=[PAD, BOS, EOS, *ROLES],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return Qwen2Tokenizer(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=None,
        additional_special_tokens=list(ROLES),
        chat_template=CHAT_TEMPLATE,
    )


def train(
    problems: Sequence[arithmetic.Operands], settings: DemoSettings
) -> tuple[Qwen2ForCausalLM, PreTrainedTokenizerBase]:
    """The warmed-up model and its tokenizer. Seeds torch's global generator."""
    torch.manual_seed(settings.seed)
    texts = [
        arithmetic.TASKS[task].question(operands)
        for task in arithmetic.TASKS
        for operands in problems[:100]
    ]
    tokenizer = build_tokenizer(texts, settings.max_vocab_size)
    model = build_model(settings, tokenizer)
    warm_up(model, tokenizer, problems, settings)
    return model, tokenizer


def build_model(settings: DemoSettings, tokenizer: PreTrainedTokenizerBase) -> Qwen2ForCausalLM:
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
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[tuple[arithmetic.Operands, int]]
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
    tokenizer: PreTrainedTokenizerBase,
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
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[arithmetic.Operands],
) -> float:
    """Expected accuracy at temperature 1: the mean probability of the right answer."""
    ids = encode(tokenizer, [(x, max(x)) for x in problems])
    return answer_logprobs(model, ids).sum(1).exp().mean().item()
