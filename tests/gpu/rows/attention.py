"""Packed attention: the call for each span and the one call of a row, right, and how fast.

The spans in float64 on the CPU are right: the tests compare them with each sequence on its own.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from gpg_megatron.host.device import Device
from gpg_megatron.host.peak import peak_flops_per_s
from gpg_megatron.policy.attention import (
    LossPositions,
    PackedAttention,
    SegmentParams,
    flash_takes,
)
from gpg_megatron.policy.spans import Span, Varlen, spans_of, varlen_of
from tests.gpu.rows.device import seconds

LIMIT = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
"""Largest difference in units of the largest right value; outputs and gradients."""
N_SHAPES = 30
LAYERS: dict[Device, tuple[int, int, int]] = {"cuda": (28, 4, 128), "cpu": (4, 2, 32)}
"""Query heads, key-value heads and their size; on a GPU those of Qwen2-7B."""
ROWS: dict[Device, tuple[int, int, int, int]] = {"cuda": (8, 8, 256, 224), "cpu": (4, 4, 64, 48)}
"""Of the row that is timed: prompts, samples of each, tokens of a prompt and of a response."""


@dataclass(frozen=True, kw_only=True)
class Packing:
    """A row as the batches pack it."""

    cu_seqlens: Sequence[int]
    prompts: Sequence[int]

    @property
    def spans(self) -> tuple[Span, ...]:
        """Of the whole row."""
        return spans_of(self.cu_seqlens, self.prompts)

    @property
    def pairs(self) -> int:
        """Of a query and a key that it sees."""
        lengths = [b - a for a, b in zip(self.cu_seqlens[:-1], self.cu_seqlens[1:], strict=True)]
        before = [lengths[prompt] if prompt >= 0 else 0 for prompt in self.prompts]
        return sum(n * (n + 1) // 2 + n * m for n, m in zip(lengths, before, strict=True))


def packing(lengths: Sequence[tuple[int, Sequence[int]]]) -> Packing:
    """Of prompts with responses, (length, lengths) each."""
    cu_seqlens = [0]
    prompts: list[int] = []
    for prompt, responses in lengths:
        first = len(prompts)
        for i, n in enumerate((prompt, *responses)):
            cu_seqlens.append(cu_seqlens[-1] + n)
            prompts.append(first if i else -1)
    return Packing(cu_seqlens=cu_seqlens, prompts=prompts)


def random_packing(rng: random.Random, longest: int) -> Packing:
    """A few prompts with up to eight responses, all of any length."""

    def length() -> int:
        return rng.randint(1, longest)

    return packing(
        [(length(), [length() for _ in range(rng.randint(0, 8))]) for _ in range(rng.randint(1, 4))]
    )


class Attention:
    """One layer's attention over one row: inputs, and the ways to compute it."""

    def __init__(
        self,
        row: Packing,
        device: Device,
        dtype: torch.dtype,
        like: Attention | None = None,
        window: int | None = None,
    ) -> None:
        """Random inputs, or those of another one, rounded."""
        n = row.cu_seqlens[-1]
        values: list[torch.Tensor] = like.values if like else random_values(n, device)
        self.values: list[torch.Tensor] = [x.detach().to(device, dtype) for x in values]
        self.inputs = [x.requires_grad_() for x in self.values[:3]]
        self.weight = self.values[3].flatten(2)
        none = torch.zeros(0, dtype=torch.int64)
        loss = LossPositions(row_N=none, own_N=none, labels_N=none)
        self.by_span = SegmentParams(spans=row.spans, varlen=None, share=None, loss=loss)
        varlen = varlen_of(row.spans, n)
        self.at_once = replace(self.by_span, varlen=_on(varlen, device))
        size = None if window is None else (window - 1, 0)
        # The rest of what it is made of makes no difference.
        config = TransformerConfig(
            num_layers=1, hidden_size=8, num_attention_heads=1, window_size=size
        )
        self.layer = PackedAttention(config)

    def run(self, params: SegmentParams) -> list[torch.Tensor]:
        """The output, and the gradients of query, key and value."""
        for x in self.inputs:
            x.grad = None
        query, key, value = self.inputs
        out = self.layer.forward(query, key, value, None, packed_seq_params=params)
        out.backward(self.weight)
        return [out.detach(), *(x.grad for x in self.inputs if x.grad is not None)]


def random_values(n_tokens: int, device: Device) -> list[torch.Tensor]:
    """Query, key, value and what the output is weighed with, of a layer; on the CPU."""
    heads, kv_heads, size = LAYERS[device]
    generator = torch.Generator().manual_seed(n_tokens)
    return [
        torch.randn(n_tokens, 1, x, size, generator=generator)
        for x in (heads, kv_heads, kv_heads, heads)
    ]


def _on(varlen: Varlen, device: Device) -> Varlen:
    names = ("cu_q_B1", "cu_k_B1", "keys_M", "copies_M", "first_copy_T1")
    found = {name: getattr(varlen, name) for name in names}
    moved: dict[str, Any] = {k: None if x is None else x.to(device) for k, x in found.items()}
    return replace(varlen, **moved)


def equal(device: Device, folder: Path) -> str:
    """Outputs and gradients of random rows, every second with a window, against float64 on the
    CPU."""
    rng = random.Random(1)
    worst: dict[str, float] = {}
    for number in range(10):
        row, window = random_packing(rng, longest=60), (None, 1 + 8 * number)[number % 2]
        right_one = Attention(row, "cpu", torch.float64, window=window)
        right = right_one.run(right_one.by_span)
        for dtype, limit in LIMIT.items():
            ours = Attention(row, device, dtype, like=right_one, window=window)
            ways = {"by span": ours.by_span}
            if flash_takes(device, dtype, LAYERS["cpu"][2]):
                ways["at once"] = ours.at_once
            for way, params in ways.items():
                for found, expected in zip(ours.run(params), right, strict=True):
                    gap = (found.cpu().double() - expected).abs().max() / expected.abs().max()
                    key = f"{way} in {str(dtype).removeprefix('torch.')}"
                    worst[key] = max(worst.get(key, 0.0), float(gap))
                    assert gap < limit, f"{key} differs by {float(gap):.1e}"
    return "; ".join(f"{way} within {gap:.1e}" for way, gap in worst.items())


def new_shapes(device: Device, folder: Path) -> str:
    """Seconds for rows of which every one has another shape, forward and backward."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    longest = 400 if device == "cuda" else 60
    told = []
    for number, (name, cudnn) in enumerate(_ways(device, dtype)):
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        rng = random.Random(number)  # no way has seen another's shapes
        warm = Attention(random_packing(rng, longest), device, dtype)
        warm.run(getattr(warm, name))
        rows = [Attention(random_packing(rng, longest), device, dtype) for _ in range(N_SHAPES)]

        def run(rows: Sequence[Attention] = rows, name: str = name) -> None:
            for row in rows:
                row.run(getattr(row, name))

        first, again = seconds(run, device), seconds(run, device)
        told.append(f"{_shown(name, cudnn, device)} {first:.2f} s, again {again:.2f}")
    return f"{N_SHAPES} new shapes: {'; '.join(told)}"


def speed(device: Device, folder: Path) -> str:
    """Tokens/s of one layer of a full row, forward and backward, and the share of the peak."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    n_prompts, n_samples, prompt, response = ROWS[device]
    row = packing([(prompt - 1, [response] * n_samples)] * n_prompts)
    heads, _, size = LAYERS[device]
    # Two products forward and five backward, of d multiplications and additions for each pair.
    flops = 7 * 2 * size * heads * row.pairs
    peak = peak_flops_per_s(device, dtype)
    told = []
    for name, cudnn in _ways(device, dtype):
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        layer = Attention(row, device, dtype)
        run = partial(layer.run, getattr(layer, name))
        run()
        took = min(seconds(run, device) for _ in range(5))
        rate = f"{row.cu_seqlens[-1] / took:.3g} tokens/s, {flops / took / peak:.1%} of the peak"
        told.append(f"{_shown(name, cudnn, device)} {rate}")
    return f"{row.cu_seqlens[-1]} tokens, {heads} heads of {size}: {'; '.join(told)}"


def _ways(device: Device, dtype: torch.dtype) -> list[tuple[str, bool]]:
    """(by_span or at_once, whether cuDNN may be chosen)."""
    ways = [("at_once", False)] if flash_takes(device, dtype, LAYERS[device][2]) else []
    return [*ways, ("by_span", False), *([("by_span", True)] if device == "cuda" else [])]


def _shown(name: str, cudnn: bool, device: Device) -> str:
    if name == "at_once" or device == "cpu":
        return name.replace("_", " ")
    return f"by span with cuDNN {'on' if cudnn else 'off'}"
