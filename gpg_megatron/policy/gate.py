"""The gated linear unit of the project's own layers on a CPU."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F


def gated_unit(x: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up (arXiv 2002.05202), floating [..., 2 F] = [gate | up] -> [..., F].

    Keeps its input alone: the backward pass computes silu(gate) again, and writes both gradients
    where the gradient of the input has them.
    """
    apply: Any = _GatedUnit.apply  # torch has no types for it
    out: torch.Tensor = apply(x)
    return out


class _GatedUnit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        gate, up = x.chunk(2, -1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        (x,), (grad,) = ctx.saved_tensors, grads
        gate, up = x.chunk(2, -1)
        out = torch.empty_like(x)
        grad_gate, grad_up = out.chunk(2, -1)
        torch.mul(grad, F.silu(gate), out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
        return out
