"""The sending end of one policy rank: its shards, packed into buckets, each on its pair's way."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from gpg_megatron.bridge.copies import copy_all
from gpg_megatron.bridge.links import Way
from gpg_megatron.bridge.plan import Bucket, agreed_order, bucket_elements
from gpg_megatron.bridge.protocol import CHECKSUM_BYTES, checksum_place, slot_bytes
from gpg_megatron.bridge.transports.base import Outbox, Patience
from gpg_megatron.bridge.transports.table import open_outbox


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One bucket on its way to one worker."""

    receiver: int
    way: Way
    number: int
    """Among the messages of this rank to the receiver."""
    bucket: Bucket


def messages_of(
    rank: int, pairs: Mapping[int, Sequence[Bucket]], ways: Mapping[int, Way], n_receivers: int
) -> list[Message]:
    """All messages of a rank in the agreed order.

    Args:
        pairs: receiver -> its buckets.
        ways: receiver -> the way that they take.
        n_receivers: of all engines.
    """
    counts = {(rank, receiver): len(buckets) for receiver, buckets in pairs.items()}
    return [
        Message(receiver=to, way=ways[to], number=number, bucket=pairs[to][number])
        for _, to, number in agreed_order(counts, n_receivers)
    ]


class Sender:
    """One outbox for each way that the rank's messages take."""

    def __init__(
        self,
        shards: Mapping[str, torch.Tensor],
        messages: Sequence[Message],
        dtype: torch.dtype,
        *,
        name: str,
        timeout_s: float,
    ) -> None:
        """Open the outboxes.

        Args:
            shards: read at every send.
            dtype: of the elements on their way.
            name: unique on the host.
        """
        self._shards = shards
        self._messages = messages
        self._dtype = dtype
        self._timeout_s = timeout_s
        self._outboxes: dict[Way, Outbox] = {}
        self._packed: torch.Tensor | None = None
        device = next(iter(shards.values())).device if shards else torch.device("cpu")
        for way in sorted({message.way for message in messages}):
            part = [message for message in messages if message.way == way]
            longest = checksum_place(max(map(self._n_bytes, part))) + CHECKSUM_BYTES
            receivers = [message.receiver for message in part]
            self._outboxes[way] = open_outbox(
                way, f"{name}_{way}", slot_bytes(longest), receivers, timeout_s, device
            )

    @property
    def addresses(self) -> dict[Way, object]:
        """What the receivers need to attach."""
        return {way: outbox.address() for way, outbox in self._outboxes.items()}

    def reset(self) -> None:
        """Forget what an interrupted transfer left. No receiver may be polling."""
        for outbox in self._outboxes.values():
            outbox.reset()

    def settle(self) -> None:
        """All receivers have attached, or will not any more."""
        for outbox in self._outboxes.values():
            outbox.settle()

    def close(self) -> None:
        """Release what is held."""
        for outbox in self._outboxes.values():
            outbox.close()

    @torch.no_grad()
    def send(self, patience: Patience, *, verify: bool) -> None:
        """Returns when every message has been read.

        Raises:
            TransferError: a receiver is late, or the update was given up.
        """
        for message in self._messages:
            outbox = self._outboxes[message.way]
            slot = patience.until(outbox.slot, f"engine worker {message.receiver} to read a bucket")
            n_bytes = self._pack(message, slot, verify=verify)
            outbox.post(message.receiver, n_bytes)
        for outbox in self._outboxes.values():
            patience.until(outbox.idle, "the engine workers to read the last buckets")

    def _n_bytes(self, message: Message) -> int:
        return bucket_elements(message.bucket) * self._dtype.itemsize

    def _pack(self, message: Message, slot: torch.Tensor, *, verify: bool) -> int:
        """Fill a slot; returns the bytes to send, checksum included."""
        n_bytes = self._n_bytes(message)
        sources = [self._shards[m.parameter][m.source_box.slices] for m in message.bucket]
        flat = self._place(slot[:n_bytes], sources[0].device).view(self._dtype)
        parts = [
            flat[m.offset : m.offset + m.numel].view(m.source_box.shape) for m in message.bucket
        ]
        copy_all(parts, sources)
        if flat.device != slot.device:
            slot[:n_bytes].copy_(flat.view(torch.uint8))
        at = checksum_place(n_bytes)
        if verify:
            checksum = zlib.crc32(slot[:n_bytes].cpu().numpy().data, message.number)
            slot[at : at + CHECKSUM_BYTES].view(torch.int64).fill_(checksum)
        return at + CHECKSUM_BYTES

    def _place(self, slot: torch.Tensor, device: torch.device) -> torch.Tensor:
        """Where a bucket is packed: in its slot, or on the GPU, if that is elsewhere."""
        if slot.device == device:
            return slot
        if self._packed is None or self._packed.nbytes < slot.nbytes:
            self._packed = torch.empty_like(slot, device=device)
        return self._packed[: slot.nbytes]
