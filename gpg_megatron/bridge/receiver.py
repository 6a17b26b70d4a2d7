"""The bridge's end inside a vLLM worker: methods that collective_rpc reaches.

vLLM mixes BridgeReceiver into its worker class (worker_extension_cls). The engine's weights
are written in place: each move lands in a strided view of a parameter.
"""

from __future__ import annotations

import functools
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gpg_megatron.bridge.plan import Destination, Move, View
from gpg_megatron.bridge.record import record_loaders
from gpg_megatron.bridge.shm import Segment


@dataclass(slots=True)
class _Inbox:
    """What arrives from one sender: its segment and this worker's moves of each bucket."""

    segment: Segment
    buckets: Sequence[Sequence[Move]]


def _remote(method: Callable[..., Any]) -> Callable[[Any, bytes], bytes]:
    """Arguments and result as pickled bytes: vLLM's own encoding knows no dataclasses."""

    @functools.wraps(method)
    def call(self: Any, arguments: bytes) -> bytes:
        return pickle.dumps(method(self, *pickle.loads(arguments)))

    return call


class BridgeReceiver:
    """Worker extension; every name starts with bridge_ so that none collides with vLLM's."""

    bridge_inboxes: dict[int, _Inbox]
    bridge_parameters: dict[str, torch.Tensor]
    bridge_dtype: torch.dtype

    @_remote
    def bridge_layout(self, hf_shapes: Mapping[str, tuple[int, ...]]) -> list[Destination]:
        """Make the parameters writable in place and say where each Hugging Face element lives.

        From here on the engine's weights are undefined until a full update has arrived.
        """
        model = self.model_runner.get_model()
        _unpack_cpu_linears(model)
        destinations = record_loaders(model, hf_shapes)
        self.bridge_parameters = {name: p.data for name, p in model.named_parameters()}
        return destinations

    @_remote
    def bridge_attach(
        self,
        segments: Mapping[int, tuple[str, int]],
        inboxes: Sequence[Mapping[int, Sequence[Sequence[Move]]]],
        dtype: str,
    ) -> None:
        """Map every sender's segment and keep this worker's moves.

        Args:
            segments: sender rank -> (name, bytes).
            inboxes: for each worker of this engine: sender rank -> for each of its buckets
                the moves to that worker.
            dtype: of the elements in the buckets, as torch spells it.
        """
        self.bridge_dtype = getattr(torch, dtype)
        buckets = inboxes[self.rank]
        self.bridge_inboxes = {
            rank: _Inbox(Segment(name, n_bytes, create=False), buckets[rank])
            for rank, (name, n_bytes) in segments.items()
        }

    @_remote
    @torch.no_grad()
    def bridge_receive(self, bucket: int) -> int:
        """Copy one bucket of every sender into the parameters; returns the elements written."""
        count = 0
        for inbox in self.bridge_inboxes.values():
            if bucket >= len(inbox.buckets):
                continue
            flat = inbox.segment.data.view(self.bridge_dtype)
            for move in inbox.buckets[bucket]:
                n = move.source_box.numel
                incoming = flat[move.offset : move.offset + n].view(move.target.shape)
                _view(self.bridge_parameters, move.target).copy_(incoming)
                count += n
        return count


def _view(parameters: Mapping[str, torch.Tensor], view: View) -> torch.Tensor:
    return parameters[view.parameter].as_strided(view.shape, view.stride, view.offset)


def _unpack_cpu_linears(model: torch.nn.Module) -> None:
    """Undo vLLM's packing of CPU linear weights, so that writing the weight has an effect.

    After loading, vLLM hands each weight to a oneDNN handler and leaves an empty parameter.
    The parameter is made again from the metadata that vLLM keeps for reloading, and the layer
    computes with torch's linear. On a GPU no layer is packed and nothing happens.
    """
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
    from vllm.model_executor.model_loader.reload.meta import materialize_meta_tensor
    from vllm.model_executor.model_loader.reload.sanitize import restore_layer_refs

    for layer in model.modules():
        if not hasattr(layer, "cpu_linear"):
            continue
        if layer.weight.numel() == 0:
            meta = get_layerwise_info(layer).restore_metadata[0]["weight"]
            layer.weight = materialize_meta_tensor(restore_layer_refs(meta, layer))
        bias = getattr(layer, "bias", None)
        if bias is not None:
            # One of the packed kernels wants an fp32 bias; torch's linear wants one dtype.
            bias.data = bias.data.to(layer.weight.dtype)
        layer.cpu_linear = torch.nn.functional.linear
