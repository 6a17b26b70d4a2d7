"""How new weights become what a vLLM model computes with, decided for each module by a probe.

    live     the forward pass reads the parameter: it is written in place
    refresh  the forward pass reads something made from the parameter (a packed copy): the
             parameter is written in place, then the engine's own post-processing runs again
    stage    post-processing replaced the parameter: a tensor in the loadable shape is filled,
             post-processed and freed again

A staging tensor lives from the first element of its module to the last one.

Latent attention also computes with products of its own: the engine splits kv_b_proj into what it
multiplies queries and outputs by. They are made again whenever kv_b_proj is complete.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from gpg_megatron.bridge.plan import Destination
from gpg_megatron.bridge.record import record_loaders

Policy = Literal["live", "refresh", "stage"]
_MARKS_PER_DIMENSION = 16
_TORCH_OWN = frozenset({"_parameters", "_buffers", "_modules"})


@dataclass(slots=True, eq=False)
class _Part:
    """A module that owns parameters directly."""

    name: str
    module: nn.Module
    policy: Policy
    parameters: frozenset[str]
    """Names, as the model spells them; a tied one has the name of its first owner."""
    loadable: Mapping[str, torch.Tensor]
    """Local name -> meta tensor in the loadable shape, with its loader. Empty unless staged."""
    absorber: Any = None
    """The module that has made weights of its own from this one's."""
    staging: dict[str, torch.Tensor] = field(default_factory=dict)
    """Local name -> what an update has begun to fill."""


class Installer:
    """Writes whole updates into one model, module by module.

    record() once; then for every update begin(), target() and wrote() for each rectangle in
    any order, finish().
    """

    def __init__(self, model: nn.Module) -> None:
        """Probe every module. The weights are the same afterwards.

        Raises:
            ValueError: the engine changed a parameter and has no way to do it again.
        """
        self._model = model
        if any(getattr(m, "is_amx_bmm_enabled", False) for m in model.modules()):
            raise ValueError(
                "the engine's kernel for latent attention on AMX drops kv_b_proj after loading; "
                "this model cannot be updated in place"
            )
        absorbers = {id(m.kv_b_proj): m for m in model.modules() if _absorbs(m)}
        self._derived = frozenset(id(p) for m in absorbers.values() for p in own_parameters(m))
        self._live = {n: p for n, p in model.named_parameters() if id(p) not in self._derived}
        owner = {id(parameter): name for name, parameter in self._live.items()}
        self._parts = [
            _examine(name, module, owner, absorbers.get(id(module)))
            for name, module in model.named_modules()
            if own_parameters(module) and not _absorbs(module)
        ]
        self._staged = {
            _join(part.name, local): (part, local)
            for part in self._parts
            for local in part.loadable
        }
        self._waiting: dict[str, list[_Part]] = defaultdict(list)
        for part in self._parts:
            for name in part.parameters if part.policy != "live" else ():
                self._waiting[name].append(part)
        self._expected: Mapping[str, int] = {}
        self._arrived: Counter[str] = Counter()

    def record(self, hf_shapes: Mapping[str, tuple[int, ...]]) -> list[Destination]:
        """Where every Hugging Face element goes, in the loadable shapes; see record_loaders."""
        with self._loadable_parameters():
            destinations = record_loaders(self._model, hf_shapes, derived=self._derived)
        expected: Counter[str] = Counter()
        for destination in destinations:
            expected[destination.view.parameter] += destination.hf.numel
        self._expected = expected
        return destinations

    @property
    def device(self) -> torch.device:
        """Of the model."""
        return next(iter(self._live.values())).device

    def begin(self) -> None:
        """Start an update; what an unfinished one has left in staging is dropped."""
        self._arrived.clear()
        for part in self._parts:
            part.staging.clear()

    def target(self, name: str) -> torch.Tensor:
        """The tensor to write, in the loadable shape. Valid until the module is complete."""
        if name not in self._staged:
            return self._live[name].data
        part, local = self._staged[name]
        if local not in part.staging:
            part.staging[local] = _materialize(part.loadable[local], part.module)
        return part.staging[local].data

    def in_place(self, name: str) -> bool:
        """Whether target gives the parameter itself."""
        return name not in self._staged

    @torch.no_grad()
    def wrote(self, name: str, n_elements: int) -> None:
        """Count elements of a parameter; the last one of a module makes it take effect."""
        self._arrived[name] += n_elements
        assert self._arrived[name] <= self._expected[name], f"{name} is written more than once"
        if not self._is_complete(name):
            return
        for part in self._waiting.get(name, ()):
            if all(map(self._is_complete, part.parameters)):
                _take_effect(part)

    def finish(self) -> None:
        """End an update.

        Raises:
            RuntimeError: elements are missing; the model must not be used.
        """
        missing = [name for name in self._expected if not self._is_complete(name)]
        if missing:
            first = missing[0]
            raise RuntimeError(
                f"the update is incomplete in {len(missing)} of the engine's parameters, first "
                f"{first}: {self._arrived[first]} of {self._expected[first]} elements"
            )
        assert not any(part.staging for part in self._parts)

    def _is_complete(self, name: str) -> bool:
        return self._arrived[name] == self._expected[name]

    @contextmanager
    def _loadable_parameters(self) -> Iterator[None]:
        """The staged parameters as meta tensors that vLLM's loaders accept; no memory."""
        from vllm.model_executor.model_loader.reload.meta import to_meta_tensor
        from vllm.model_executor.model_loader.reload.sanitize import restore_layer_refs

        kept = [(part.module, local) for part, local in self._staged.values()]
        runtime = [module._parameters[local] for module, local in kept]
        try:
            for part, local in self._staged.values():
                # A copy: the engine keeps its own free of references to the module.
                meta = to_meta_tensor(part.loadable[local])
                part.module._parameters[local] = restore_layer_refs(  # type: ignore[assignment]
                    meta, part.module
                )
            yield
        finally:
            for (module, local), parameter in zip(kept, runtime, strict=True):
                module._parameters[local] = parameter


def own_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Without those of modules in it."""
    return [p for p in module._parameters.values() if p is not None]


def _absorbs(module: Any) -> bool:
    """Whether the engine has made its weights from those of a projection."""
    return hasattr(module, "kv_b_proj") and hasattr(module, "W_UV")


def _examine(
    name: str, module: nn.Module, owner: Mapping[int, str], absorber: nn.Module | None
) -> _Part:
    from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    runtime = {local: p for local, p in module._parameters.items() if p is not None}
    loadable = get_layerwise_info(module).restore_metadata[0]
    replaced = [local for local, p in loadable.items() if not _same_form(runtime.get(local), p)]
    if isinstance(getattr(module, "quant_method", None), QuantizeMethodBase):
        policy = "stage" if replaced else _probe(module, {n: runtime[n] for n in loadable})
    elif replaced:
        raise ValueError(
            f"the engine changed {_join(name, replaced[0])} after loading and names no method "
            f"that could change it again; this model cannot be updated in place"
        )
    else:
        policy = "live"
    if absorber is not None and policy == "live":
        policy = "refresh"
    names = frozenset(owner[id(p)] for p in runtime.values())
    return _Part(name, module, policy, names, loadable if policy == "stage" else {}, absorber)


@torch.no_grad()
def _probe(module: nn.Module, parameters: Mapping[str, nn.Parameter]) -> Policy:
    """Post-process once more and see what that changes; undone afterwards.

    If it replaces or rearranges a parameter, the forward pass reads the outcome. If it leaves
    anything else behind, such as a new kernel, the forward pass may read that. If it does
    neither, the parameter is all there is.
    """
    generator = torch.Generator().manual_seed(0)
    samples = {name: _sample(p) for name, p in parameters.items()}
    saved = {name: sample.clone() for name, sample in samples.items()}
    marks = {
        name: torch.rand(sample.shape, generator=generator).to(sample)
        for name, sample in samples.items()
    }
    for name, sample in samples.items():
        sample.copy_(marks[name])
    before = _attributes(module)
    try:
        _post_process(module)
        kept = all(
            (new := module._parameters[name]) is not None
            and _same_form(new, parameter)
            and new.data_ptr() == parameter.data_ptr()
            and torch.equal(samples[name], marks[name])
            for name, parameter in parameters.items()
        )
        after = _attributes(module)
    finally:
        for name, parameter in parameters.items():
            samples[name].copy_(saved[name])
            module._parameters[name] = parameter
        _restore_attributes(module, before)
    if not kept:
        return "stage"
    return "live" if _unchanged(before, after) else "refresh"


def _take_effect(part: _Part) -> None:
    """Post-process a module whose elements have all arrived; its staging is freed."""
    module = part.module
    runtime = {local: module._parameters[local] for local in part.loadable}
    module._parameters.update(part.staging)  # type: ignore[arg-type]
    part.staging.clear()
    _post_process(module)
    for local, old in runtime.items():
        new = module._parameters[local]
        assert new is not None and old is not None and _same_form(new, old), (
            f"{part.name}.{local}: the engine packs differently than before"
        )
        # Captured graphs and kernels hold on to the first tensor.
        old.data.copy_(new.data)
        module._parameters[local] = old
    if part.absorber is not None:
        # In place, since captured graphs hold on to these too.
        part.absorber.process_weights_after_loading(part.absorber.W_UV.dtype)


def _post_process(module: nn.Module) -> None:
    """What the engine did to the module after loading, in full."""
    vars(module).pop("_already_called_process_weights_after_loading", None)
    method: Any = module.quant_method
    method.process_weights_after_loading(module)
    kernel = getattr(method, "moe_kernel", None)
    if kernel is not None:
        # The engine leaves this hook out when the kernel exists already, and CPU experts are
        # packed there.
        kernel.fused_experts.process_weights_after_loading(module)


def _materialize(meta: torch.Tensor, module: nn.Module) -> torch.Tensor:
    """Memory for a meta tensor; zero, because loaders fill the padding with zeros."""
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
    from vllm.model_executor.model_loader.reload.meta import materialize_meta_tensor
    from vllm.model_executor.model_loader.reload.sanitize import restore_layer_refs

    with get_layerwise_info(module).restore_device:
        return restore_layer_refs(materialize_meta_tensor(meta), module).zero_()


def _sample(parameter: torch.Tensor) -> torch.Tensor:
    """A view of some elements of every region."""
    view = parameter.data
    for dimension, size in enumerate(parameter.shape):
        step = max(1, size // _MARKS_PER_DIMENSION)
        view = view[(slice(None),) * dimension + (slice(None, None, step),)]
    return view


def _same_form(a: torch.Tensor | None, b: torch.Tensor) -> bool:
    return a is not None and (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


def _attributes(module: nn.Module) -> dict[tuple[int, str], Any]:
    """What post-processing may leave on a module or its method, apart from parameters."""
    own = {(0, name): value for name, value in vars(module).items() if name not in _TORCH_OWN}
    own |= {(1, name): value for name, value in module._buffers.items()}
    return own | {(2, name): value for name, value in vars(module.quant_method).items()}


def _restore_attributes(module: nn.Module, before: Mapping[tuple[int, str], Any]) -> None:
    homes = (vars(module), module._buffers, vars(module.quant_method))
    for home, name in _attributes(module).keys() - before.keys():
        del homes[home][name]
    for (home, name), value in before.items():
        homes[home][name] = value


def _unchanged(before: Mapping[Any, Any], after: Mapping[Any, Any]) -> bool:
    plain = (bool, int, float, str, torch.dtype, type(None))
    return before.keys() == after.keys() and all(
        value is after[key] or (isinstance(value, plain) and value == after[key])
        for key, value in before.items()
    )


def _join(module: str, parameter: str) -> str:
    return f"{module}.{parameter}" if module else parameter
