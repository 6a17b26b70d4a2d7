"""Which errors of a collective mean that another rank is gone: their texts as the backends print
them."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from gpg_megatron.host.device import is_lost_peer

NCCL = "NCCL error in: ../torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp:3690, "
LOST = [
    RuntimeError("[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.2]:1"),
    RuntimeError("gloo: Read error: Connection reset by peer"),
    dist.DistBackendError(
        f"{NCCL}remote process exited or there was a network error, NCCL version 2.29.7\n"
        "ncclRemoteError: A call failed possibly due to a network error or a remote process "
        "exiting prematurely."
    ),
    dist.DistBackendError("NCCL communicator was aborted on rank 1. Original reason: ..."),
    dist.DistBackendError(
        "[Rank 1] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7, "
        "OpType=ALLREDUCE, Timeout(ms)=600000) ran for 600012 milliseconds before timing out."
    ),
    dist.DistNetworkError(
        "failed to recv, got 0 bytes. Connection was likely closed. Did the remote server shutdown "
        "or crash?"
    ),
]
OWN = [
    RuntimeError("shape '[2, 3]' is invalid for input of size 5"),
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    dist.DistBackendError(
        f"{NCCL}invalid usage, NCCL version 2.29.7\nncclInvalidUsage: This usually reflects "
        "invalid usage of NCCL library.\nDuplicate GPU detected : rank 1 and rank 0 both on CUDA "
        "device 1b000"
    ),
    dist.DistBackendError(f"{NCCL}unhandled cuda error, NCCL version 2.29.7\nCuda failure 2"),
]


@pytest.mark.parametrize("error", LOST, ids=str)
def test_a_lost_rank_is_recognised(error: RuntimeError) -> None:
    assert is_lost_peer(error)


@pytest.mark.parametrize("error", OWN, ids=str)
def test_an_error_of_this_rank_is_not_taken_for_one(error: RuntimeError) -> None:
    assert not is_lost_peer(error)
