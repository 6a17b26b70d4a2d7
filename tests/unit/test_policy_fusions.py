"""Fused operations of the policy compute what plain ones compute, and keep less.

Megatron compiles its own; here they run as they are written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from benchmarks.large_layouts import QWEN2_7B
from gpg_megatron.config.sections import PolicyConfig
from gpg_megatron.host.device import Device
from gpg_megatron.policy.on_cpu import quiet_megatron

quiet_megatron()
from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl  # noqa: E402

from gpg_megatron.policy.gate import gated_unit  # noqa: E402
from gpg_megatron.policy.model import _transformer_config  # noqa: E402
from gpg_megatron.policy.norm import RMSNorm  # noqa: E402

N, WIDTH = 7, 48
DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(autouse=True)
def uncompiled() -> Iterator[None]:
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_gated_linear_unit_is_megatrons_on_gpus_alone(device: Device) -> None:
    config = _transformer_config(QWEN2_7B, PolicyConfig(), torch.bfloat16, device)
    assert config.bias_activation_fusion is (device == "cuda")
    assert config.use_te_activation_func is (device == "cpu")
    assert config.apply_rope_fusion is False, "there is no Transformer Engine"


def run(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor, list[int]]:
    """The result, the gradient of the input, and the bytes of each tensor that is kept."""
    leaf, kept = x.clone().requires_grad_(), dict[int, int]()

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        out = function(leaf)
    generator = torch.Generator().manual_seed(1)
    out.backward(torch.randn(out.shape, generator=generator).to(out.dtype))
    assert leaf.grad is not None
    return out.detach(), leaf.grad, sorted(kept.values())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_fused_gated_linear_unit(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, 1, 2 * WIDTH, generator=generator).to(dtype)

    def plain(y: Tensor) -> Tensor:
        gate, up = y.chunk(2, dim=-1)
        return F.silu(gate) * up

    right, fused = run(plain, x), run(lambda y: bias_swiglu_impl(y, None), x)
    own = run(gated_unit, x)
    assert torch.equal(own[0], right[0]) and torch.equal(own[1], right[1])
    assert own[2] == [x.nbytes], "its input alone"
    for a, b in zip(right[:2], fused[:2], strict=True):
        # Each step rounds here; compiled, they round once.
        torch.testing.assert_close(
            a, b, rtol=0.02 if dtype == torch.bfloat16 else 1e-5, atol=4 * torch.finfo(dtype).eps
        )
    assert fused[2] == [x.nbytes], "its input alone"
    assert sum(right[2]) == x.nbytes + x.nbytes // 2, "and the silu of the gate"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_norm_is_that_of_fp32_rounded_once_before_the_weight(dtype: torch.dtype) -> None:
    config = _transformer_config(QWEN2_7B, PolicyConfig(), dtype, "cpu")
    norm = RMSNorm(config, WIDTH, 1e-5)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(WIDTH, generator=generator))

    def in_fp32(x: Tensor) -> Tensor:
        x32 = x.float()
        scale = torch.rsqrt(x32.square().mean(-1, keepdim=True) + 1e-5)
        return norm.weight * (x32 * scale).to(dtype)

    x = torch.randn(N, 1, WIDTH, generator=generator).to(dtype)
    (right, right_grad, _), weight_grad = run(in_fp32, x), gradient_of(norm.weight)
    (found, grad, kept), own_weight_grad = run(norm, x), gradient_of(norm.weight)
    assert torch.equal(right, found)
    torch.testing.assert_close(right_grad, grad)
    torch.testing.assert_close(weight_grad, own_weight_grad)
    weight_bytes = WIDTH * dtype.itemsize
    assert kept == sorted([x.nbytes, weight_bytes, N * 4]), "input, weight and a factor of a token"


def gradient_of(weight: torch.nn.Parameter) -> Tensor:
    """That of the last backward pass."""
    grad, weight.grad = weight.grad, None
    assert grad is not None
    return grad
