"""What config.json says of weights in FP8 with a scale for each block, as DeepSeek-V3 is published.

    value[i, j] = stored[i, j] * scale[i // rows, j // columns]

The scales of a tensor are another one, under its name with SUFFIX (arXiv 2412.19437, section 3.3).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SUFFIX = "_scale_inv"


def blocks_of(quantization: object) -> tuple[int, int] | None:
    """Rows and columns of a block, of config.json's quantization_config; None: it says something
    else."""
    if not isinstance(quantization, Mapping) or quantization.get("quant_method") != "fp8":
        return None
    blocks: Any = quantization.get("weight_block_size")
    known = quantization.get("fmt", "e4m3") == "e4m3" and isinstance(blocks, list)
    if not known or len(blocks) != 2 or any(type(n) is not int or n < 1 for n in blocks):
        return None
    return blocks[0], blocks[1]


def scale_shape(shape: tuple[int, ...], blocks: tuple[int, int]) -> tuple[int, ...]:
    """Of the scales of a matrix."""
    return tuple(-(-n // size) for n, size in zip(shape, blocks, strict=True))
