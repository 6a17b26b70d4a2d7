"""What attention costs on a GPU, without one: calls that are recorded, and arithmetic.

    python -m benchmarks.attention

First the calls of a layer's attention in one row of the recipe, recorded on a device without
values: one for each span, against one for the row. Then one layer of Qwen2-7B over a group of n
responses, with prompts packed separately under Transformer Engine's attention and with the shared
prompt under the project's: FLOPs and bytes over the rates below. Prints one line of JSON last.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.large_layouts import QWEN2_7B
from gpg_megatron.policy.attention import attend_at_once, attend_by_span
from gpg_megatron.policy.spans import Varlen, spans_of, varlen_of

SHAPE = QWEN2_7B

# ---- rates of an H100 (SXM), per second -------------------------------------------------------

PRODUCTS = 0.6 * 989e12
"""Matrix products, at an assumed share of the data sheet's dense bf16 rate."""
FLASH_2, FLASH_3 = 350e12, 740e12
"""FlashAttention-2, which torch has; FlashAttention-3 or cuDNN, which Transformer Engine has; at
best (arXiv 2407.08608)."""
MEMORY = 3.35e12
"""Bytes, data sheet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """n responses to one prompt, in tokens."""

    prompt: int
    response: int
    n: int


GROUPS = (
    Group(prompt=130, response=300, n=5),  # GSM8K under the recipe
    Group(prompt=1024, response=1024, n=5),  # the recipe's limits
    Group(prompt=1024, response=4096, n=8),
    Group(prompt=130, response=8192, n=8),
    Group(prompt=130, response=300, n=1),
)


# ---- arithmetic -------------------------------------------------------------------------------


def separate(group: Group) -> tuple[int, int]:
    """Tokens, and pairs of a token and one that it attends to."""
    length = group.prompt + group.response
    return group.n * length, group.n * length * (length + 1) // 2


def shared(group: Group) -> tuple[int, int]:
    """The same where the prompt is computed once, as batching.planning lays it out."""
    if group.n == 1:
        return separate(group)
    once, own = group.prompt - 1, group.response
    pairs = once * (once + 1) // 2 + group.n * (own * once + own * (own + 1) // 2)
    return once + group.n * own, pairs


def layer_seconds(n_tokens: int, n_pairs: int, attention: float) -> tuple[float, float]:
    """Forward and backward of a layer's matrix products, and of its attention.

    A product costs 2 operations for each parameter and token forward and twice that backward; a
    pair costs 4 for each head and its size, and 2.5 times that backward, where the scores are
    computed again.
    """
    q_width, kv_width = SHAPE.num_heads * SHAPE.head_dim, SHAPE.num_kv_heads * SHAPE.head_dim
    parameters = SHAPE.hidden_size * (2 * q_width + 2 * kv_width + 3 * SHAPE.ffn_size)
    return 3 * 2 * parameters * n_tokens / PRODUCTS, 3.5 * 4 * q_width * n_pairs / attention


def gather_seconds(group: Group) -> float:
    """Reading and writing keys and values forward, and their gradients backward, in bf16."""
    if group.n == 1:
        return 0.0
    n_tokens, _ = shared(group)
    n_keys = n_tokens + group.n * (group.prompt - 1)
    numbers = 2 * SHAPE.num_kv_heads * SHAPE.head_dim
    # Forward every key is read and written; backward every copy is read, every position written.
    return 2 * numbers * (2 * n_keys + n_keys + n_tokens) / MEMORY


def compare(group: Group) -> dict[str, float]:
    """One layer, forward and backward, in milliseconds."""
    theirs, ours = layer_seconds(*separate(group), FLASH_3), layer_seconds(*shared(group), FLASH_2)
    gather = gather_seconds(group)
    return {
        "tokens_separate": separate(group)[0],
        "tokens_shared": shared(group)[0],
        "products_separate_ms": 1e3 * theirs[0],
        "attention_separate_ms": 1e3 * theirs[1],
        "products_shared_ms": 1e3 * ours[0],
        "attention_shared_ms": 1e3 * ours[1],
        "gather_ms": 1e3 * gather,
        "speedup": sum(theirs) / (sum(ours) + gather),
    }


# ---- recorded calls ---------------------------------------------------------------------------


class Recorder(TorchDispatchMode):
    """Counts the operations that start kernels: all but views and allocations."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self.n = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        self.n += not (func.is_view or name.startswith(("empty", "_unsafe_view", "detach")))
        return func(*args, **(kwargs or {}))


@contextmanager
def kernels_of_cuda() -> Iterator[None]:
    """scaled_dot_product_attention as CUDA computes it: one kernel. Elsewhere it is several."""

    def attention(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attn_mask: Any, **_: Any
    ) -> torch.Tensor:
        if attn_mask is None:
            out: torch.Tensor = torch.ops.aten._scaled_dot_product_flash_attention(
                q, k, v, 0.0, True
            )[0]
            return out
        bias = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill_(~attn_mask, -torch.inf)
        bias = bias.expand(*q.shape[:3], k.shape[2])
        efficient = torch.ops.aten._scaled_dot_product_efficient_attention
        result: torch.Tensor = efficient(q, k, v, bias, True)[0]
        return result

    with mock.patch.object(F, "scaled_dot_product_attention", attention):
        yield


def recipe_row(max_tokens: int) -> tuple[list[int], list[int]]:
    """(cu_seqlens, prompts) of groups of 5 responses of 100 to 500 tokens."""
    rng, cu_seqlens, prompts = random.Random(0), [0], list[int]()
    while cu_seqlens[-1] + 129 + 5 * 500 <= max_tokens:
        prompt = len(prompts)
        for n, at in ((129, -1), *((rng.randint(100, 500), prompt) for _ in range(5))):
            cu_seqlens.append(cu_seqlens[-1] + n)
            prompts.append(at)
    return cu_seqlens, prompts


def recorded(attend: Callable[..., torch.Tensor], n_tokens: int) -> tuple[int, int]:
    """Calls forward and backward."""
    heads = (SHAPE.num_heads, SHAPE.num_kv_heads, SHAPE.num_kv_heads)
    q, k, v = (
        torch.empty(
            n_tokens, n, SHAPE.head_dim, dtype=torch.bfloat16, device="meta", requires_grad=True
        )
        for n in heads
    )
    with kernels_of_cuda(), Recorder() as forward:
        out = attend(q, k, v)
    with Recorder() as backward:
        out.backward(torch.empty_like(out))
    return forward.n, backward.n


def on_meta(varlen: Varlen) -> Varlen:
    names = ("cu_q_B1", "cu_k_B1", "keys_M", "copies_M", "first_copy_T1")
    return replace(varlen, **{name: getattr(varlen, name).to("meta") for name in names})


def main() -> None:
    cu_seqlens, prompts = recipe_row(32768)
    spans = spans_of(cu_seqlens, prompts)
    varlen = on_meta(varlen_of(spans, cu_seqlens[-1]))
    counts = {
        "by span": recorded(partial(attend_by_span, spans=spans, window=None), cu_seqlens[-1]),
        "at once": recorded(partial(attend_at_once, varlen=varlen, window=None), cu_seqlens[-1]),
    }
    print(f"{cu_seqlens[-1]} tokens in {len(prompts)} segments, {len(spans)} spans\n")
    print("| attention of a layer | calls forward | calls backward |\n|---|---|---|")
    for name, (forward, backward) in counts.items():
        print(f"| {name} | {forward} | {backward} |")
    print()
    print("| prompt | response | n | tokens | ms, products + attention | shared: tokens | "
          "ms, products + attention + gather | faster |\n|" + "---|" * 8)  # fmt: skip
    rows = [(group, compare(group)) for group in GROUPS]
    for g, x in rows:
        print(
            f"| {g.prompt} | {g.response} | {g.n} | {x['tokens_separate']} | "
            f"{x['products_separate_ms']:.2f} + {x['attention_separate_ms']:.2f} | "
            f"{x['tokens_shared']} | {x['products_shared_ms']:.2f} + "
            f"{x['attention_shared_ms']:.2f} + {x['gather_ms']:.3f} | {x['speedup']:.2f} |"
        )
    print(json.dumps({"calls": counts, "speedups": [round(x["speedup"], 2) for _, x in rows]}))


if __name__ == "__main__":
    main()
