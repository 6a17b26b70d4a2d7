"""The policy as another program would compute it: right, but rounded in other places."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch


@contextmanager
def rounded_elsewhere(
    decoders: Sequence[torch.nn.Module], dtype: torch.dtype, seed: int
) -> Iterator[None]:
    """Within the context every output of every module below `decoders` is off by a random share
    of up to one unit roundoff of a type, as if it had been rounded to it once more.

    Which numbers are drawn depends on the module's place and the seed alone, so that ranks that
    hold the same activations still do.

    Args:
        dtype: of the coarser of two computations that are to agree.
        seed: another one moves the outputs otherwise.
    """
    unit = torch.finfo(dtype).eps / 2
    below = (module for decoder in decoders for module in [*decoder.modules()][1:])
    hooks = [
        module.register_forward_hook(partial(_move, unit, 1000 * seed + number))
        for number, module in enumerate(below, start=1)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _move(unit: float, seed: int, module: torch.nn.Module, inputs: Any, output: Any) -> Any:
    """A forward hook. Megatron's modules return a tensor, or one and what goes with it; some
    return a function, which has nothing to round."""
    values, *rest = output if isinstance(output, tuple) else (output,)
    if not torch.is_tensor(values) or not values.is_floating_point():
        return output
    generator = torch.Generator(values.device).manual_seed(seed)
    shares = torch.empty(values.shape, device=values.device, dtype=torch.float32)
    shares.uniform_(-unit, unit, generator=generator)
    moved = (values + values.float() * shares).to(values.dtype)
    return (moved, *rest) if isinstance(output, tuple) else moved
