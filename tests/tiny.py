"""A tiny model with random weights and a byte-level tokenizer, as a Hugging Face directory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

Family = Literal[
    "qwen2", "qwen3", "llama", "mistral", "glm4", "qwen3_moe", "qwen2_moe", "glm4_moe",
    "deepseek_v2", "deepseek_v3", "qwen3_next", "qwen3_5_text", "qwen3_5_moe_text",
]  # fmt: skip
DELTA = ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")
"""Every second layer of theirs has attention, the others a gated delta net."""
EOS = "<|im_end|>"
PAD = "<|endoftext|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
DIGIT_ANSWERS = [f"#### {d}" for d in range(10)] + [f"\\boxed{{{d}}}" for d in range(10)]
"""What make_answering_model says: one token each."""


def make_tiny_model(
    directory: Path,
    *,
    hidden_size: int = 128,
    num_layers: int = 2,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    vocab_size: int = 320,
    seed: int = 0,
    sharpness: float = 1.0,
    family: Family = "qwen2",
    tied: bool = True,
    max_position_embeddings: int = 512,
) -> Path:
    """Write config, fp32 safetensors and tokenizer files; head size 32.

    sharpness scales the final norm, and so the logits: random weights alone sample nearly
    uniformly. The families with experts have four, two for each token.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = _byte_tokenizer()
    assert hidden_size == 32 * num_heads, "vLLM on CPU knows head size 32, not smaller ones"
    assert len(tokenizer) <= vocab_size
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        family,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        max_position_embeddings=max_position_embeddings,
        tie_word_embeddings=tied,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.05,
        **{"num_key_value_heads": num_kv_heads} | _family_options(family, hidden_size),
    )
    model = AutoModelForCausalLM.from_config(config).float()
    centre = float(family in DELTA)  # of the norm's factor
    model.model.norm.weight.data = sharpness * (model.model.norm.weight.data + centre) - centre
    for name, parameter in model.named_parameters():
        # Made as zeros, which hide a mix-up.
        if family in ("llama", "glm4", "glm4_moe") and name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    for name, buffer in model.named_buffers():
        if name.endswith("correction_bias"):
            torch.nn.init.normal_(buffer, std=0.1)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def make_answering_model(directory: Path) -> Path:
    """A Qwen2 with a chat template that answers any problem with a digit, as GSM8K and as MATH
    want it, at random: about every tenth problem with such an answer is solved.

    One direction of the embeddings is the same for every token, and the rows of the output
    layer that belong to answers point to it.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    make_tiny_model(directory, num_layers=4, tied=False, max_position_embeddings=2048)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.add_tokens(DIGIT_ANSWERS)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory)
    likely = [*tokenizer.convert_tokens_to_ids(DIGIT_ANSWERS), tokenizer.eos_token_id]
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] += 4.0
        model.lm_head.weight[likely, 0] += 0.6
    model.save_pretrained(directory)
    return directory


def _family_options(family: Family, hidden_size: int) -> dict[str, Any]:
    """What a family's configuration needs besides the common keys."""
    options: dict[str, Any] = {}
    if family.startswith(("qwen3", "glm4")):
        options["head_dim"] = 32
    if family == "llama":
        options |= {"attention_bias": True, "mlp_bias": True}
    if family == "mistral":
        options["sliding_window"] = 6  # fewer than the tokens of a sequence
    if family in DELTA:
        options |= {"full_attention_interval": 2, "linear_num_key_heads": 4}
        options |= {"linear_num_value_heads": 8}
        options |= {"linear_key_head_dim": 64, "linear_value_head_dim": 64}
    if family in ("qwen2_moe", "qwen3_moe", "qwen3_next", "qwen3_5_moe_text"):
        options |= {"num_experts": 4, "num_experts_per_tok": 2}
        options |= {"moe_intermediate_size": hidden_size // 2}
        options["norm_topk_prob"] = family != "qwen2_moe"
    if family in ("glm4_moe", "deepseek_v2", "deepseek_v3"):
        options |= {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1}
        options |= {"moe_intermediate_size": hidden_size // 2, "routed_scaling_factor": 1.5}
    if family == "glm4_moe":
        options |= {"attention_bias": True, "use_qk_norm": True}
    if family in ("deepseek_v2", "deepseek_v3"):
        # Sizes for which vLLM's kernels on CPU are compiled.
        options |= {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "first_k_dense_replace": 1}
        options |= {"qk_nope_head_dim": 32, "v_head_dim": 32, "num_key_value_heads": None}
        options |= {"n_group": 2, "topk_group": 1, "n_routed_experts": 8}
    if family == "deepseek_v3":
        options |= {"q_lora_rank": 48, "scoring_func": "sigmoid", "topk_method": "noaux_tc"}
    if family == "deepseek_v2":
        options |= {"q_lora_rank": None, "topk_method": "group_limited_greedy"}
    if family == "qwen2_moe":
        options["mlp_only_layers"] = [1]
    if family in ("qwen2_moe", "qwen3_next", "qwen3_5_moe_text"):
        options["shared_expert_intermediate_size"] = hidden_size
    return options


def _byte_tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=EOS, pad_token=PAD)


def write_problems(
    path: Path,
    prompts: Sequence[str],
    *,
    answers: Sequence[str] | None = None,
    data_source: str = "arithmetic/tiny",
) -> Path:
    """A jsonl file in the row schema; without answers the ground truth is "0"."""
    with path.open("w") as file:
        for prompt, answer in zip(prompts, answers or ["0"] * len(prompts), strict=True):
            row = {
                "data_source": data_source,
                "prompt": [{"role": "user", "content": prompt}],
                "ability": "math",
                "reward_model": {"style": "rule", "ground_truth": answer},
                "extra_info": {},
            }
            file.write(json.dumps(row) + "\n")
    return path
