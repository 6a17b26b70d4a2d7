"""Every redirection that Megatron-Core needs where the policy is on CPU.

Megatron-Core 0.16 names CUDA in a few dozen lines that have nothing to do with CUDA kernels:
factories with device="cuda", tensor-type comparisons, the random-number tracker. In a process
whose policy is on a GPU this module changes nothing but for a name that Megatron lacks where
Transformer Engine is missing. In one whose policy is on CPU, whether the machine has a GPU or not,
`redirect_megatron_to_cpu` points those lines at the CPU, once, before any Megatron object is made.
Beside it only policy/checkpoint.py replaces something of Megatron.
"""

from __future__ import annotations

import functools
import importlib
import logging
import sys
import types
import warnings
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from gpg_megatron.policy.gradients import add_product
from gpg_megatron.policy.transformer_engine import PACKAGE, has_transformer_engine


def quiet_megatron() -> None:
    """Silence what Megatron says on import about missing Transformer Engine and Apex, what torch
    says to Megatron about collectives and shards that have a new name, and what it says about
    checkpoint directories that are not empty.

    To be called before Megatron is imported; gpg-doctor tells what is installed.
    """
    warnings.filterwarnings("ignore", module=r"megatron\.")
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    warnings.filterwarnings("ignore", "Please use DTensor instead", FutureWarning)
    logging.getLogger("megatron.core.dist_checkpointing").setLevel(logging.ERROR)


def hide_gpu_libraries() -> None:
    """Make libraries of kernels for GPUs absent in this process, whose policy is on CPU.

    Megatron takes their optimizer and norms wherever they can be imported, and has torch compile
    small functions, which imports the compiler for seconds; on CPU none of them is compiled. To be
    called before Megatron is imported.
    """
    modules: dict[str, Any] = sys.modules
    modules.update(dict.fromkeys((PACKAGE, "apex", "amp_C")))
    whole: Any = torch
    whole.compile = lambda model=None, **_: model if model is not None else lambda f: f


@functools.cache
def define_missing_names() -> None:
    """What Megatron-Core 0.16 only defines with Transformer Engine, but always reads. Idempotent.

    The router asks whether Transformer Engine's matrix product is None.
    """
    if not has_transformer_engine():
        moe_utils: Any = importlib.import_module("megatron.core.transformer.moe.moe_utils")
        moe_utils.te_general_gemm = None


# ---- Megatron-Core on CPU -----------------------------------------------------------------

_CPU_NAMES = {
    "cuda": "cpu",
    "torch.cuda.FloatTensor": "torch.FloatTensor",
    "torch.cuda.HalfTensor": "torch.HalfTensor",
    "torch.cuda.BFloat16Tensor": "torch.BFloat16Tensor",
}

# Modules whose functions hold those strings as constants: torch.zeros(..., device="cuda") and
# param.type() == "torch.cuda.FloatTensor".
_MODULES_NAMING_CUDA = (
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.optimizer.clip_grads",
    "megatron.core.optimizer.distrib_optimizer",
    "megatron.core.optimizer.grad_scaler",
    "megatron.core.optimizer.optimizer",
    "megatron.core.transformer.utils",
    "megatron.core.utils",
    "megatron.core.distributed.param_and_grad_buffer",
)


@functools.cache
def redirect_megatron_to_cpu() -> None:
    """Make Megatron-Core 0.16 run on CPU in this process. Idempotent."""
    assert not has_transformer_engine(), "hide_gpu_libraries comes before Megatron's import"
    cuda: Any = torch.cuda
    # RoPE, the schedules and the layers ask for "the current device" of their factories.
    cuda.current_device = lambda: torch.device("cpu")
    # The pipeline synchronises after point-to-point transfers; gloo's have ended by then.
    cuda.synchronize = lambda *_: None
    # The tracker that gives tensor-parallel ranks different dropout states.
    cuda.get_rng_state = lambda *_: torch.get_rng_state()
    cuda.manual_seed = torch.manual_seed
    # Tied embeddings move their weight to the GPU for the first all-reduce.
    tensor: Any = torch.Tensor
    tensor.cuda = lambda self, *_, **__: self

    # Where Megatron came before hide_gpu_libraries, it compiles small element-wise functions; that
    # would cost every new shape seconds and a C++ compiler.
    compiler: Any = sys.modules.get("torch._dynamo")
    if compiler is not None:
        compiler.config.disable = True

    random: Any = importlib.import_module("megatron.core.tensor_parallel.random")
    random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    for name in _MODULES_NAMING_CUDA:
        _retarget_module(importlib.import_module(name))
    _redirect_weight_gradients()
    _redirect_experts()


def _redirect_weight_gradients() -> None:
    """Linear layers add a weight's gradient where gradients are: what Apex has a kernel for.
    An embedding's is of the rows that were looked up, not of the whole vocabulary."""
    layers: Any = importlib.import_module("megatron.core.tensor_parallel.layers")
    layers.fused_weight_gradient_mlp_cuda = types.SimpleNamespace(wgrad_gemm_accum_fp32=add_product)
    layers._grad_accum_fusion_available = True
    layers.F = types.SimpleNamespace(embedding=functools.partial(F.embedding, sparse=True))


def _redirect_experts() -> None:
    """The dispatcher of tokens to experts, with gloo and without CUDA streams."""
    moe = importlib.import_module("megatron.core.transformer.moe.token_dispatcher")
    dispatcher: Any = moe.MoEAlltoAllTokenDispatcher
    # It copies its token counts to the CPU on a stream of its own; they are there already.
    dispatcher.cuda_dtoh_stream = "none on CPU"
    dispatcher._maybe_dtoh_and_synchronize = _counts_to_numpy
    # Under tensor parallelism it gathers as many tokens from each rank as were sent there.
    mappings: Any = importlib.import_module("megatron.core.tensor_parallel.mappings")
    mappings._gather_along_first_dim = _gather_with_gloo(mappings._gather_along_first_dim)


def _counts_to_numpy(dispatcher: Any, point: str, tokens_per_expert: Any = None) -> Any:
    """Of MoEAlltoAllTokenDispatcher._maybe_dtoh_and_synchronize what is left without a GPU: the
    collectives want split sizes as numbers, not as tensors."""
    if point == dispatcher.cuda_dtoh_point:
        for name in ("input_splits", "output_splits", "output_splits_tp"):
            counts = getattr(dispatcher, name)
            setattr(dispatcher, name, None if counts is None else counts.numpy())
    return tokens_per_expert


def _gather_with_gloo(equal_sizes: Any) -> Any:
    """Megatron's _gather_along_first_dim; gloo's all_gather refuses tensors of unequal sizes, and
    its all_to_all does not."""

    def gather(
        tensor: torch.Tensor, group: Any, sizes: Any = None, use_global_buffer: bool = False
    ) -> Any:
        if sizes is None or group.size() == 1:
            return equal_sizes(tensor, group, None, use_global_buffer)
        copies = tensor.repeat(group.size(), *[1] * (tensor.dim() - 1))
        gathered = tensor.new_empty(sum(sizes), *tensor.shape[1:])
        own = [tensor.shape[0]] * group.size()
        dist.all_to_all_single(gathered, copies, list(sizes), own, group=group)
        return gathered

    return gather


def _retarget_module(module: types.ModuleType) -> None:
    """Rewrite the constants of _CPU_NAMES in all functions and methods defined in a module.

    Cheaper at run time than a TorchFunctionMode, which would tax every operation, and
    narrower than patching torch's factories for the whole process.
    """
    for item in list(vars(module).values()):
        if getattr(item, "__module__", None) != module.__name__:
            continue
        members = list(vars(item).values()) if isinstance(item, type) else [item]
        for member in members:
            member = getattr(member, "fget", None) or getattr(member, "__func__", member)
            function = getattr(member, "__wrapped__", member)
            if isinstance(function, types.FunctionType):
                function.__code__ = _retarget_code(function.__code__)


def _retarget_code(code: types.CodeType) -> types.CodeType:
    return code.replace(co_consts=tuple(_retarget_constant(c) for c in code.co_consts))


def _retarget_constant(constant: object) -> object:
    if isinstance(constant, str):
        return _CPU_NAMES.get(constant, constant)
    if isinstance(constant, tuple):
        return tuple(_retarget_constant(item) for item in constant)
    if isinstance(constant, types.CodeType):
        return _retarget_code(constant)
    return constant
