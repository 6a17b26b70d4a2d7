"""A process that holds parameters as one worker of a vLLM engine does, and receives updates.

    python -m tests.gpu.rows.publish_worker JOB

Senders connect one after the other to the socket of the job, and call the functions below by
name. On SIGTERM it writes what failed, and ends.
"""

from __future__ import annotations

import json
import pickle
import signal
import sys
import zlib
from collections.abc import Mapping
from multiprocessing.connection import Connection as Pipe
from multiprocessing.connection import Listener
from pathlib import Path
from typing import Any

import torch

from gpg_megatron.bridge.engine_layout import Engine, destinations, parameter_shapes
from gpg_megatron.bridge.receiver import Receiver
from gpg_megatron.bridge.seats import own_seat
from gpg_megatron.bridge.transports.base import TransferError
from gpg_megatron.model.shape import load_model_shape


class Tensors:
    """The parameters; see bridge.receiver.Target."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], device: torch.device) -> None:
        self.device = device
        self.parameters = {
            name: torch.zeros(shape, dtype=torch.bfloat16, device=device)
            for name, shape in shapes.items()
        }

    def target(self, name: str) -> torch.Tensor:
        """A parameter."""
        return self.parameters[name]

    def in_place(self, name: str) -> bool:
        """Always."""
        return True

    def wrote(self, name: str, n_elements: int) -> None:
        """Nothing follows."""


class Worker:
    """What a sender may call."""

    def __init__(self, job: Mapping[str, Any]) -> None:
        device = torch.device("cpu")
        if job["device"] == "cuda":
            device = torch.device("cuda", job["index"])
            torch.cuda.set_device(device)
        self.engine = Engine(model=load_model_shape(job["folder"], need_weights=False), tp_size=1)
        self.device = device
        self.failures: list[str] = []
        self.receiver: Receiver | None = None

    def layout(self, arguments: bytes) -> bytes:
        """As BridgeReceiver.bridge_layout."""
        (shapes,) = pickle.loads(arguments)
        self.wanted = destinations(self.engine, shapes, 0)
        self.target = Tensors(parameter_shapes(self.engine, shapes, 0), self.device)
        if self.receiver is not None:
            self.receiver.close()
        self.receiver = Receiver(self.target, 0)
        return pickle.dumps((self.wanted, own_seat(self.device)))

    def connect(self, payload: bytes) -> None:
        """Attach to the sender."""
        assert self.receiver is not None
        self.receiver.connect(pickle.loads(payload), 0)

    def receive(self, payload: bytes) -> None:
        """A whole update."""
        assert self.receiver is not None
        self.receiver.receive(pickle.loads(payload))

    def checksums(self) -> dict[str, int]:
        """Hugging Face name -> CRC-32 of what stands in its place."""
        found = {}
        for place in self.wanted:
            view = place.view
            tensor = self.target.parameters[view.parameter]
            values = tensor.as_strided(view.shape, view.stride, view.offset)
            found[place.hf_name] = checksum(values)
        return found

    def serve(self, pipe: Pipe) -> None:
        """Answer one sender until it leaves, or dies."""
        try:
            while True:
                name, *arguments = pipe.recv()
                try:
                    pipe.send((True, getattr(self, name)(*arguments)))
                except TransferError as error:
                    self.failures.append(str(error))
                    pipe.send((False, str(error)))
        except (EOFError, ConnectionError):
            return


def checksum(tensor: torch.Tensor) -> int:
    """CRC-32 of its bytes, row by row."""
    flat = tensor.contiguous().cpu().reshape(-1)
    return zlib.crc32(flat.view(torch.uint8).numpy().data)


def main() -> None:
    job = json.loads(sys.argv[1])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    worker = Worker(job)
    try:
        with Listener(job["socket"], "AF_UNIX") as listener:
            while True:
                with listener.accept() as pipe:
                    worker.serve(pipe)
    finally:
        Path(job["worker_out"]).write_text(json.dumps({"failures": worker.failures}))


if __name__ == "__main__":
    main()
