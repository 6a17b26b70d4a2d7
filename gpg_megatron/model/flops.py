"""Floating-point operations of training on a token, from the shape of the model.

What is counted are the matrix products that the mathematics needs: 2 operations for each
multiply-add, forward once and backward twice (as in arXiv 2204.02311, appendix B). Operations
that are repeated to save memory are not counted.
"""

from __future__ import annotations

from dataclasses import dataclass

from gpg_megatron.shapes import ModelShape

_FORWARD_AND_BACKWARD = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenCosts:
    """What a sequence costs: linear in its tokens, plus attention, which is not."""

    per_token: float
    """Of each token, in all layers."""
    per_loss_token: float
    """Of each token that reaches the vocabulary projection, in addition."""
    per_pair: float
    """Of each pair of a token and one that it attends to, itself included."""
    window: int | None = None
    """Tokens that a token attends to at most, itself included; None: all before it."""

    def pairs(self, before: int, own: int) -> int:
        """Of `own` tokens in a row and what they attend to, with so many tokens before them."""
        last, window = before + own, self.window or before + own
        beyond = _sum_to(max(0, last - window)) - _sum_to(max(0, before - window))
        return _sum_to(last) - _sum_to(before) - beyond

    def total(self, *, n_tokens: int, n_loss_tokens: int, n_pairs: int) -> float:
        """Floating-point operations."""
        return (
            self.per_token * n_tokens
            + self.per_loss_token * n_loss_tokens
            + self.per_pair * n_pairs
        )


def _sum_to(n: int) -> int:
    """1 + ... + n."""
    return n * (n + 1) // 2


def token_costs(shape: ModelShape) -> TokenCosts:
    """The costs of a model."""
    q_width = shape.num_heads * shape.head_dim
    kv_width = shape.num_kv_heads * shape.head_dim
    n_attention = shape.num_layers - len(shape.delta_layers)
    attention = n_attention * shape.hidden_size * (
        (2 + shape.output_gate) * q_width + 2 * kv_width
    ) + len(shape.delta_layers) * _delta_net(shape)
    n_dense = len(shape.dense_layers)
    mlps = n_dense * 3 * shape.hidden_size * shape.ffn_size
    if shape.moe is not None:
        width = shape.moe.experts_per_token * shape.moe.ffn_size + shape.moe.shared_ffn_size
        experts = shape.hidden_size * (3 * width + shape.moe.num_experts)
        mlps += (shape.num_layers - n_dense) * experts
    per_multiply_add = 2.0 * _FORWARD_AND_BACKWARD
    return TokenCosts(
        per_token=per_multiply_add * (attention + mlps),
        per_loss_token=per_multiply_add * shape.hidden_size * shape.vocab_size,
        per_pair=per_multiply_add * n_attention * 2 * q_width,
        window=shape.window,
    )


def _delta_net(shape: ModelShape) -> int:
    """Multiply-adds for one token in one layer: projections, convolution, and of each head's state
    what it predicts of the value, what is written and what is read."""
    delta = shape.delta
    if delta is None:
        return 0
    keys, values, heads = delta.key_width, delta.value_width, delta.value_heads
    projections = shape.hidden_size * (2 * keys + 3 * values + 2 * heads)
    return projections + delta.kernel * (2 * keys + values) + 3 * values * delta.key_dim
