"""The gated delta net (arXiv 2412.06464), an attention layer with a state instead of keys, over
packed segments some of which share a prompt; chunks.py says who follows whom.

Each head keeps a matrix S [key, value]. With key k, value v, decay e^g and rate b of a token

    S <- e^g S;  S <- S + k (b (v - S^T k))^T;  its output is S^T q

computed chunk by chunk as in section 3.3 there: with the cumulative decay D_i within a chunk, the
writes U of its tokens solve (1 + tril(b_i k_i k_j e^(D_i - D_j), -1)) U = b (v - e^D S^T k).
Operation by operation in torch, on CUDA too; the state and all about it are in fp32, as in
transformers and vLLM.

Shape legend: T tokens, N chunks of C positions, H key heads of K elements, each with R value heads
of V elements; the last two dimensions are those of a matrix.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    checkpoint,
    copy_to_tensor_model_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from gpg_megatron.policy.attention import SegmentParams
from gpg_megatron.policy.chunks import Chunks
from gpg_megatron.shapes import DeltaShape

_NORM_EPS = 1e-6
"""Under the root of the norms of queries and keys, as in the reference's kernels."""
_SPLIT = ("conv_weight", "A_log", "dt_bias")
"""Cut by tensor parallelism, each rank its key heads and what belongs to them."""


class GatedDeltaNet(MegatronModule):  # type: ignore[misc]  # Megatron has no types
    """In the place of Megatron's self-attention. Rows are by key head, in the projection [q; k;
    v; output gate; b; a] and in the convolution [q; k; v], so that each rank has whole heads."""

    def __init__(
        self, config: TransformerConfig, layer_number: int, *, delta: DeltaShape, **_: Any
    ) -> None:
        super().__init__(config)
        tp, dtype = config.tensor_model_parallel_size, config.params_dtype
        self.key_heads, heads = delta.key_heads // tp, delta.value_heads // tp
        self.value_heads = heads // self.key_heads
        self.key_dim, self.value_dim = delta.key_dim, delta.value_dim
        values = self.value_heads * delta.value_dim
        self._qkv = (delta.key_dim, delta.key_dim, values)
        self._parts = (sum(self._qkv), values, self.value_heads, self.value_heads)
        options = {"config": config, "init_method": config.init_method, "bias": False}
        self.in_proj = ColumnParallelLinear(
            config.hidden_size, delta.key_heads * sum(self._parts), gather_output=False, **options
        )
        self.out_proj = RowParallelLinear(
            delta.value_width,
            config.hidden_size,
            input_is_parallel=True,
            skip_bias_add=True,
            **options,
        )

        def parameter(*shape: int) -> torch.nn.Parameter:
            return torch.nn.Parameter(torch.empty(shape, dtype=dtype))

        self.conv_weight = parameter(self.key_heads * sum(self._qkv), 1, delta.kernel)
        self.A_log, self.dt_bias, self.norm_weight = map(parameter, (heads, heads, delta.value_dim))
        for name in _SPLIT:
            set_tensor_model_parallel_attributes(getattr(self, name), True, 0, 1)

    def forward(
        self, hidden: torch.Tensor, *, packed_seq_params: SegmentParams, **_: Any
    ) -> tuple[torch.Tensor, None]:
        """[T, 1, hidden], under sequence parallelism this rank's part of it -> the same."""
        chunks = packed_seq_params.chunks
        assert chunks is not None
        mixed = self.in_proj(hidden)[0][:, 0].unflatten(1, (self.key_heads, -1))
        qkv, gate, b, a = mixed.split(self._parts, dim=-1)
        qkv = F.silu(convolve(qkv.flatten(1), self.conv_weight[:, 0], chunks))
        q, k, v = qkv.unflatten(1, (self.key_heads, -1)).split(self._qkv, dim=-1)
        by_head = (self.key_heads, self.value_heads)
        decay = self.A_log.float().exp().view(by_head)
        decay = -decay * F.softplus(a.float() + self.dt_bias.view(by_head))
        heads = (self.value_heads, self.value_dim)
        rule = partial(delta_rule, chunks)
        if self.config.recompute_granularity == "selective":
            rule = partial(checkpoint, rule, False)
        out = rule(q, k, v.unflatten(2, heads), decay, b.sigmoid())
        out = out.to(v.dtype).unflatten(1, by_head)
        # Each rank has seen its own heads, so the gradients of the weight are added.
        weight = copy_to_tensor_model_parallel_region(self.norm_weight)
        out = weight * F.rms_norm(out, out.shape[-1:], eps=self.config.layernorm_epsilon)
        out = (out * F.silu(gate.unflatten(2, heads).float())).to(v.dtype)
        return self.out_proj(out.flatten(1).unsqueeze(1))[0], None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> dict[str, Any]:
        """Megatron's, but for what tensor parallelism cuts here."""
        sharded: dict[str, Any] = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        own = {name: getattr(self, name) for name in _SPLIT}
        axes = dict.fromkeys(_SPLIT, 0)
        sharded |= make_sharded_tensors_for_checkpoint(own, prefix, axes, sharded_offsets)
        return sharded


def convolve(x: torch.Tensor, weight: torch.Tensor, chunks: Chunks) -> torch.Tensor:
    """Each channel's sum over a token and those before it in its sequence: [T, channels], weight
    [channels, kernel], the present token's last -> [T, channels]."""
    weight = weight.float()
    out = x * weight[:, -1]
    for back in range(1, min(weight.shape[1], len(x))):
        out = out + F.pad(x[:-back] * weight[:, -1 - back], (0, 0, back, 0))
    # An index of tensors: its gradient is the same in every run, though prompts are read often.
    seen_KBD = F.pad(x, (0, 0, 0, 1))[chunks.before_KB]
    at_borders = (seen_KBD * weight.T.unsqueeze(1)).sum(0)
    return out.index_copy(0, chunks.border_B, at_borders).to(x.dtype)


def delta_rule(
    chunks: Chunks,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    decay: torch.Tensor,
    rate: torch.Tensor,
) -> torch.Tensor:
    """q and k [T, H, K], not yet normed; v [T, H, R, V]; logarithm of the decay and rate [T, H, R]
    -> fp32 [T, H * R, V]."""
    q, k = (_unit(x.float()) for x in (q, k))
    q = q * q.shape[-1] ** -0.5
    # [N, H, 1, C, K], of v [N, H, R, C, V], of decay and rate [N, H, R, C].
    q, k = (_in_chunks(x, chunks).permute(0, 2, 1, 3).unsqueeze(2) for x in (q, k))
    v = _in_chunks(v.float(), chunks).permute(0, 2, 3, 1, 4)
    decay, rate = (_in_chunks(x.float(), chunks).permute(0, 2, 3, 1) for x in (decay, rate))
    decay = decay.cumsum(-1)
    size = decay.shape[-1]
    above = torch.ones(size, size, dtype=torch.bool, device=v.device).triu(1)
    between = (decay.unsqueeze(-1) - decay.unsqueeze(-2)).masked_fill(above, -torch.inf).exp()
    since_start, rate = decay.exp().unsqueeze(-1), rate.unsqueeze(-1)
    system = (k @ k.mT) * between * rate
    right = torch.cat([rate * v, rate * since_start * k], dim=-1)
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    out = _scan(
        solved.split([v.shape[-1], k.shape[-1]], dim=-1),
        (q * since_start, (q @ k.mT) * between),
        (k * (decay[..., -1:] - decay).exp().unsqueeze(-1), since_start[..., -1:, :]),
        chunks,
    )
    return out.permute(0, 3, 1, 2, 4).flatten(0, 1).flatten(1, 2).index_select(0, chunks.place_T)


def _scan(
    writes: tuple[torch.Tensor, ...],
    reads: tuple[torch.Tensor, ...],
    updates: tuple[torch.Tensor, ...],
    chunks: Chunks,
) -> torch.Tensor:
    """The outputs [N, H, R, C, V], round by round.

    Args:
        writes: what each token writes if the state before the chunk is zero, and the part of that
            state to take off.
        reads: what each token reads of the state before the chunk, and of the writes in it.
        updates: how the writes enter the state, and how far it decays over the chunk.
    """
    outputs, at = [], 0
    ended: torch.Tensor | None = None
    for wave in chunks.waves:
        state = None if ended is None else ended[wave.parents]
        finished = []
        for n, n_next in zip(wave.n_active, (*wave.n_active[1:], 0), strict=True):
            (write, off), (old, new), (enter, fall) = (
                [x[at : at + n] for x in pair] for pair in (writes, reads, updates)
            )
            at += n
            if state is not None:
                write = write - off @ state
            out = new @ write
            outputs.append(out if state is None else out + old @ state)
            # Nobody goes on from the last wave.
            kept = n_next if wave is chunks.waves[-1] else n
            entered = enter[:kept].mT @ write[:kept]
            state = entered if state is None else state[:kept] * fall[:kept] + entered
            finished.append(state[n_next:])
            state = state[:n_next]
        ended = torch.cat(finished)
    return torch.cat(outputs)


def _unit(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + _NORM_EPS)


def _in_chunks(x: torch.Tensor, chunks: Chunks) -> torch.Tensor:
    """[T, ...] -> [N, C, ...], zero where a chunk is filled up."""
    padded = torch.cat([x, x.new_zeros(1, *x.shape[1:])])
    found: torch.Tensor = padded.index_select(0, chunks.row_NC.flatten())
    return found.view(*chunks.row_NC.shape, *x.shape[1:])
