"""Whether Transformer Engine can be used: asked as Megatron-Core asks, by importing it.

A build for another torch is installed and yet does not import; Megatron then falls back to other
layers and optimizers without a word, each of its files for itself.
"""

from __future__ import annotations

import functools
import importlib
from importlib import metadata, util

from gpg_megatron.errors import UserError

PACKAGE = "transformer_engine"
# What Megatron-Core 0.16 imports of it for layers, optimizer and gradient norm.
_NAMES = {
    PACKAGE: ("__version__",),
    "transformer_engine.pytorch": ("Linear", "LayerNormLinear", "DotProductAttention"),
    "transformer_engine.pytorch.fp8": ("FP8GlobalStateManager", "fp8_autocast"),
    "transformer_engine.pytorch.optimizers": (
        "FusedAdam",
        "multi_tensor_applier",
        "multi_tensor_l2norm",
        "multi_tensor_scale",
    ),
}
# Where Megatron-Core 0.16 notes what came of it.
_FLAGS = {
    "megatron.core.extensions.transformer_engine": "HAVE_TE",
    "megatron.core.models.gpt.gpt_layer_specs": "HAVE_TE",
    "megatron.core.transformer.transformer_block": "HAVE_TE",
}


@functools.cache
def has_transformer_engine() -> bool:
    """Whether Megatron's layers can be Transformer Engine's in this process."""
    return all(getattr(importlib.import_module(m), flag) for m, flag in _FLAGS.items())


def check_transformer_engine() -> None:
    """For a run on GPUs: it is absent, or all of it that Megatron wants can be imported.

    Raises:
        UserError: it is installed and cannot be used.
    """
    if problem := transformer_engine_problem():
        raise UserError(problem)


def transformer_engine_problem() -> str:
    """One line; empty: it is absent, or can be used."""
    if util.find_spec(PACKAGE) is None:
        return ""
    problem = _missing_name() or _lowered_flag()
    return problem and (
        f"Transformer Engine {_version()} is installed, but Megatron cannot use it: {problem}; "
        "expected a build for this torch (docs/install-gpu.md), or none: pip uninstall "
        "transformer-engine transformer-engine-torch"
    )


def _missing_name() -> str:
    """The first name that cannot be imported, and why; empty: all can."""
    for module, names in _NAMES.items():
        try:
            found = importlib.import_module(module)
        except (ImportError, OSError, AssertionError, RuntimeError) as error:
            return f"import {module}: {(str(error) or repr(error)).strip().splitlines()[0]}"
        for name in names:
            if not hasattr(found, name):
                return f"{module} has no {name}"
    return ""


def _lowered_flag() -> str:
    for module, flag in _FLAGS.items():
        if not getattr(importlib.import_module(module), flag):
            return f"{module}.{flag} is false"
    return ""


def _version() -> str:
    try:
        return metadata.version("transformer-engine")
    except metadata.PackageNotFoundError:
        return "of an unknown version"
