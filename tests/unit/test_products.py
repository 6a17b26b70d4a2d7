"""bf16's products in fp32: the same numbers, rounded once; nothing else changes."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gpg_megatron.host import products
from gpg_megatron.policy.gradients import add_product

PROGRAM = """
import torch
import torch.nn.functional as F
from gpg_megatron.host import products
from gpg_megatron.host.products import redirect_bf16_products

products._has_bf16_products = lambda: False  # as on a CPU without AVX-512


def tensors(dtype, *shapes):
    generator = torch.Generator().manual_seed(7)
    made = [torch.randn(shape, generator=generator).bfloat16().to(dtype) for shape in shapes]
    return [x.requires_grad_() for x in made]


def with_gradients(function, dtype, *shapes):
    inputs = tensors(dtype, *shapes)
    out = function(*inputs)
    size = torch.arange(out.numel()).reshape(out.shape).cos()
    return [out.detach(), *torch.autograd.grad(out, inputs, size.bfloat16().to(dtype))]


def attend(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def attend_masked(q, k, v):
    mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


heads = ((1, 4, 33, 16), (1, 2, 33, 16), (1, 2, 33, 16))
CASES = {
    "matmul": (torch.matmul, (5, 3, 64), (64, 24)),
    "batched": (torch.matmul, (4, 9, 40), (4, 40, 7)),
    "linear": (F.linear, (16, 48), (10, 48)),
    "of few rows": (F.linear, (3, 48), (10, 48)),
    "in blocks": (F.linear, (9, 700), (3100, 700)),
    "with bias": (F.linear, (20, 48), (10, 48), (10,)),
    "attention": (attend, *heads),
    "masked attention": (attend_masked, (1, 4, 9, 16), *heads[1:]),
}
wide = {name: with_gradients(run, torch.float32, *shapes) for name, (run, *shapes) in CASES.items()}
redirect_bf16_products()
redirect_bf16_products()
for name, (run, *shapes) in CASES.items():
    again = with_gradients(run, torch.float32, *shapes)
    assert all(torch.equal(a, b) for a, b in zip(again, wide[name], strict=True)), name
    low = with_gradients(run, torch.bfloat16, *shapes)
    assert {x.dtype for x in low} == {torch.bfloat16}, name
    right = [x.bfloat16() for x in wide[name]]
    for a, b in zip(low, right, strict=True):
        # Attention's backward pass is given the rounded output; few rows are torch's own; blocks
        # may be added up in another order.
        if "attention" in name or name in ("of few rows", "in blocks"):
            torch.testing.assert_close(a, b, rtol=2**-6, atol=2**-6)
        else:
            assert torch.equal(a, b), name


a, b, bias = (x.detach() for x in tensors(torch.float32, (7, 40), (40, 9), (9,)))
low_a, low_b, low_bias = (x.bfloat16() for x in (a, b, bias))
fresh, turned = torch.empty(0).bfloat16(), torch.empty(9, 7).bfloat16().t()
assert torch.mm(low_a, low_b, out=fresh) is fresh
assert torch.equal(fresh, (a @ b).bfloat16())
torch.addmm(low_bias, low_a, low_b, alpha=0.5, out=turned)
assert torch.equal(turned, torch.addmm(bias, a, b, alpha=0.5).bfloat16())
assert turned.stride() == (1, 7)
for wrong in (lambda: torch.mm(low_a, b), lambda: torch.mm(low_a, low_b, out=torch.empty(7, 9))):
    try:
        wrong()
    except RuntimeError as error:
        assert "dtype" in str(error), error
    else:
        raise AssertionError("types were mixed")
print("ok")
"""


SIZES = st.integers(1, 5)


def test_products_and_attention_are_those_of_fp32_rounded_once() -> None:
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM], capture_output=True, text=True, timeout=120
    )
    assert (run.stdout, run.stderr, run.returncode) == ("ok\n", "", 0)


@pytest.mark.parametrize("has_bf16", [False, True])
@given(n=SIZES, n_in=SIZES, n_out=SIZES)
def test_a_product_is_added_in_fp32(has_bf16: bool, n: int, n_in: int, n_out: int) -> None:
    generator = torch.Generator().manual_seed(100 * n + 10 * n_in + n_out)
    x, grad = (torch.randn(n, k, generator=generator).bfloat16() for k in (n_in, n_out))
    total = torch.randn(n_out, n_in, generator=generator)
    right = total.double() + grad.double().t() @ x.double()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "_has_bf16_products", lambda: has_bf16)
        add_product(x, grad, total)
    product = (grad.double().abs().t() @ x.double().abs()).max().item()
    # torch's kernels of bf16 give a product of eight bits.
    limit = product * 2**-8 if has_bf16 else 1e-5
    torch.testing.assert_close(total.double(), right, rtol=1e-6, atol=limit + 1e-6)


def test_only_bf16_on_a_cpu_without_it_is_computed_in_another_type(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(products, "_has_bf16_products", lambda: False)
    assert products.product_dtype("cpu", torch.bfloat16) == torch.float32
    assert products.product_dtype("cpu", torch.float16) == torch.float16
    assert products.product_dtype("cuda", torch.bfloat16) == torch.bfloat16
    monkeypatch.setattr(products, "_has_bf16_products", lambda: True)
    assert products.product_dtype("cpu", torch.bfloat16) == torch.bfloat16
