"""What autograd keeps of a gated delta net: pure arithmetic, in bytes."""

from __future__ import annotations

from gpg_megatron.shapes import DeltaShape

_FP32 = 4
_CHUNK = 64
"""Tokens of a chunk, see policy/chunks.py."""


def kept_bytes(delta: DeltaShape, item: int) -> int:
    """Of one token in one layer, before tensor parallelism divides it: operation by operation, as
    policy/delta.py computes.

                                   elements (k of all keys, v of all values, heads of values n)
        projection                 2 k + 2 v + 2 n
        convolution, its unit      2 (2 k + v)
        norm, gate, output         4 v
        in fp32: q, k, v           4 k + v, normed and not
        within a chunk of c        c (4 n + 2 key heads)
        what is written            2 v + n of a key's elements
        read and written states    2 n of a key's elements, and the state for each chunk
        gate                       2 v

    Args:
        item: bytes of an element of the model's type.
    """
    k, v, n = delta.key_width, delta.value_width, delta.value_heads
    own = (2 * k + 2 * v + 2 * n) + 2 * (2 * k + v) + 4 * v
    within = _CHUNK * (4 * n + 2 * delta.key_heads)
    fp32 = 4 * k + 5 * v + within + 3 * n * delta.key_dim + v * delta.key_dim // _CHUNK
    return item * own + _FP32 * fp32
