"""Tensors that arrive bit by bit, whatever the type of the elements on their way.

A model's state is fp32, and its last bits decide. Each is a vector; on its way it is one of more
elements, whose bytes are its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from gpg_megatron.bridge.plan import Destination
from gpg_megatron.layout.boxes import Box
from gpg_megatron.layout.topology import Held


class StateTensors:
    """Those of a model, by their Hugging Face names."""

    def __init__(self, names: frozenset[str], dtype: torch.dtype) -> None:
        """dtype: of the elements on their way."""
        self._names = names
        self._dtype = dtype
        self._width = torch.float32.itemsize // dtype.itemsize

    def held(self, held: Mapping[str, Sequence[Held]]) -> dict[str, Sequence[Held]]:
        """What ranks hold, in elements on their way."""
        wide = {
            name: [replace(x, hf=self._wide(x.hf), local=self._wide(x.local)) for x in held[name]]
            for name in self._names
        }
        return {**held, **wide}

    def shards(
        self, shards: Mapping[str, torch.Tensor], held: Mapping[str, Sequence[Held]]
    ) -> dict[str, torch.Tensor]:
        """A rank's, as views of elements on their way."""
        own = {x.parameter for name in self._names for x in held[name]}
        return {n: t.view(self._dtype) if n in own else t for n, t in shards.items()}

    def destinations(self, wanted: Sequence[Destination]) -> list[Destination]:
        """A worker's, in elements on their way."""
        return [self._destination(x) if x.hf_name in self._names else x for x in wanted]

    def widths(self, wanted: Sequence[Destination]) -> dict[str, int]:
        """Engine parameter -> elements on their way for each of its own."""
        return {x.view.parameter: self._width for x in wanted if x.hf_name in self._names}

    def _destination(self, x: Destination) -> Destination:
        assert x.view.stride == (1,), x
        shape, offset = (x.view.shape[0] * self._width,), x.view.offset * self._width
        return Destination(x.hf_name, self._wide(x.hf), replace(x.view, shape=shape, offset=offset))

    def _wide(self, box: Box) -> Box:
        ((start, stop),) = box.ranges
        return Box(((start * self._width, stop * self._width),))
