"""Record where vLLM's own weight loaders put every Hugging Face element.

The loaders are run once on meta tensors that have the checkpoint's names and shapes. Each
copy they attempt is written down instead of executed: the source's storage tells the Hugging
Face tensor, the offsets and strides on both sides tell the rectangles. So no table of vLLM's
fused and sharded parameters is needed, for any model.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gpg_megatron.bridge.plan import Destination, View
from gpg_megatron.layout.boxes import Box


class _CopyRecorder(TorchDispatchMode):
    """Collects (destination, source) of every copy_ from a meta tensor, executing none.

    Fills (of vocabulary padding) are executed, and counted as written.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.copies: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.fills: list[torch.Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default and args[1].is_meta:
            self.copies.append((args[0], args[1]))
            return args[0]
        if func in (torch.ops.aten.fill_.Scalar, torch.ops.aten.zero_.default):
            self.fills.append(args[0])
        return func(*args, **(kwargs or {}))


def record_loaders(
    model: torch.nn.Module,
    hf_shapes: Mapping[str, tuple[int, ...]],
    *,
    derived: frozenset[int] = frozenset(),
) -> list[Destination]:
    """Run model.load_weights dry and return where each element goes.

    Args:
        model: a vLLM model whose parameters have their loadable shapes.
        hf_shapes: every tensor of the checkpoint.
        derived: the ids of parameters that the engine makes from others, and does not load.

    Raises:
        ValueError: a loader did something that is not a plain copy of a rectangle, or parts
            of a parameter were never written; the parameter is named.
    """
    tensors = {name: torch.empty(shape, device="meta") for name, shape in hf_shapes.items()}
    names = {_storage(tensor): name for name, tensor in tensors.items()}
    loaded = {name: p for name, p in model.named_parameters() if id(p) not in derived}
    parameters = {_storage(p): name for name, p in loaded.items() if p.numel()}
    recorder = _CopyRecorder()
    with recorder, torch.no_grad():
        load: Any = model.load_weights
        load(iter(tensors.items()))
    result = []
    for target, source in recorder.copies:
        name = names.get(_storage(source))
        parameter = parameters.get(_storage(target))
        if name is None or parameter is None:
            raise ValueError(
                f"the engine's loader of {name or parameter} copies a tensor that is no view of "
                f"the checkpoint or of a parameter; this model cannot be updated in place"
            )
        box = _box_of(source, tensors[name], name)
        result.append(Destination(name, box, _view(parameter, target)))
    filled = ((parameters.get(_storage(fill)), fill) for fill in recorder.fills)
    fills = [_view(parameter, fill) for parameter, fill in filled if parameter]
    _check_coverage(loaded, [*(d.view for d in result), *fills])
    return result


def _storage(tensor: torch.Tensor) -> int:
    """Identity of the memory under a tensor, also on the meta device."""
    return int(tensor.untyped_storage()._cdata)


def _view(parameter: str, tensor: torch.Tensor) -> View:
    return View(parameter, int(tensor.storage_offset()), tuple(tensor.shape), tensor.stride())


def _box_of(view: torch.Tensor, whole: torch.Tensor, name: str) -> Box:
    """The rectangle that a view covers of a contiguous tensor."""
    starts, rest = [], view.storage_offset()
    for stride in whole.stride():
        starts.append(rest // stride)
        rest %= stride
    box = Box(tuple((start, start + n) for start, n in zip(starts, view.shape, strict=False)))
    fits = view.stride() == whole.stride() and all(
        stop <= n for (_, stop), n in zip(box.ranges, whole.shape, strict=True)
    )
    if not fits:
        raise ValueError(f"the engine's loader reshapes {name}; only rectangles can be moved")
    return box


def _check_coverage(parameters: Mapping[str, torch.nn.Parameter], views: Sequence[View]) -> None:
    """Every element of every parameter is written or filled exactly once."""
    written: dict[str, list[View]] = defaultdict(list)
    for view in views:
        written[view.parameter].append(view)
    for name, parameter in parameters.items():
        count = sum(math.prod(view.shape) for view in written[name])
        if count != parameter.numel():
            raise ValueError(
                f"the engine's parameter {name} has {parameter.numel()} elements, and its "
                f"loaders write {count}"
            )
        if not _disjoint(written[name]):
            raise ValueError(f"the engine's loaders write parts of its parameter {name} twice")


def _disjoint(views: Sequence[View]) -> bool:
    """Whether no element is in two of the views of one parameter."""
    spans = sorted((view.offset, _last(view)) for view in views)
    if all(last < first for (_, last), (first, _) in pairwise(spans)):
        return True
    # Interleaved, as columns are: count the elements themselves.
    hits = torch.zeros(max(last for _, last in spans) + 1, dtype=torch.uint8)
    for view in views:
        hits.as_strided(view.shape, view.stride, view.offset).add_(1)
    return int(hits.max()) <= 1


def _last(view: View) -> int:
    """Offset of a view's last element."""
    steps = ((n - 1) * stride for n, stride in zip(view.shape, view.stride, strict=True))
    return view.offset + sum(steps)
