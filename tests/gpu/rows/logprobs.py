"""Log-probabilities from hidden states by chunks of tokens."""

from __future__ import annotations

from pathlib import Path

import torch

from gpg_megatron.host.device import Device
from gpg_megatron.policy.logprobs import VocabShard, vocab_parallel_logprobs
from tests.gpu.rows.device import seconds

SIZES: dict[Device, tuple[int, int, int]] = {"cuda": (8192, 3584, 152064), "cpu": (300, 64, 4096)}
"""Tokens, hidden size and vocabulary; on a GPU those of a 7B model."""
CHUNK_BYTES = {"cuda": 256 * 2**20, "cpu": 2**20}
CHECKED = 64
"""Tokens whose log-probs are computed a second time, in float64 on the CPU."""


def chunks(device: Device, folder: Path) -> str:
    """Forward and backward, in one chunk and in many; the first tokens against the CPU."""
    n, h, v = SIZES[device]
    generator = torch.Generator(device).manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, dtype=torch.bfloat16, generator=generator)

    hidden = (random(n, h) / h**0.25).requires_grad_()
    weight = (random(v, h) / h**0.25).requires_grad_()
    labels = torch.randint(v, (n,), device=device, generator=generator)
    told: list[str] = []
    found: list[torch.Tensor] = []
    for name, n_bytes in (("one chunk", 4 * n * v), ("chunks", CHUNK_BYTES[device])):
        shard = VocabShard(first=0, n_tokens=v, temperature=1.0, chunk_bytes=n_bytes, group=None)

        def run(shard: VocabShard = shard) -> None:
            hidden.grad = weight.grad = None
            logprobs, _ = vocab_parallel_logprobs(hidden, weight, labels, shard, with_entropy=False)
            found[-1] = logprobs
            logprobs.sum().backward()

        found.append(torch.empty(0))
        run()
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated() if device == "cuda" else 0
        took = seconds(run, device)
        extra = (torch.cuda.max_memory_allocated() - held) / 2**30 if device == "cuda" else 0.0
        told.append(f"{name}: {n / took:.0f} tokens/s" + (f", {extra:.2f} GiB" if extra else ""))
    apart = float((found[0] - found[1]).abs().max())
    rows = hidden[:CHECKED].detach().cpu().double() @ weight.detach().cpu().double().T
    right = rows.log_softmax(1).gather(1, labels[:CHECKED, None].cpu())[:, 0]
    gap = float((found[1][:CHECKED].cpu() - right).abs().max())
    assert apart < 1e-3 and gap < 0.1, f"chunks differ by {apart:.1e}, from the CPU by {gap:.1e}"
    return f"{'; '.join(told)}; apart {apart:.1e}, from float64 on the CPU {gap:.1e} nats"
