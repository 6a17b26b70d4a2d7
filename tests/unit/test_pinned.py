"""Host memory in pieces: every byte has its place, and rounding costs next to nothing."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gpg_megatron.host import pinned
from gpg_megatron.host.pinned import HostBuffer, piece_sizes, pinned_bytes

GIB = 1 << 30


@pytest.mark.parametrize(
    ("n_bytes", "pieces", "taken"),
    [
        (0, [], 0),
        (1, [1], 1),
        (3 * GIB, [GIB] * 3, 3 * GIB),
        (GIB + 5, [GIB, 5], GIB + 8),
        # The embedding of Qwen2-7B in fp32; by itself it would take 4 GiB.
        (152064 * 3584 * 4, [GIB, GIB, 32505856], 2 * GIB + (32 << 20)),
    ],
)
def test_only_the_last_piece_is_rounded(n_bytes: int, pieces: list[int], taken: int) -> None:
    assert piece_sizes(n_bytes) == pieces
    assert pinned_bytes(n_bytes) == taken


@given(st.integers(0, 40), st.lists(st.integers(0, 30), max_size=8))
def test_bytes_come_back_from_where_they_were_put(piece: int, lengths: list[int]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pinned, "PIECE_BYTES", piece + 1)
        buffer = HostBuffer(sum(lengths), "cpu")
        values = torch.arange(sum(lengths), dtype=torch.uint8)
        ends = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
        for start, stop in zip(ends, ends[1:], strict=False):
            done = start
            for view in buffer.views(start, stop):
                view.copy_(values[done : done + len(view)])
                done += len(view)
            assert done == stop
        found = [view.clone() for view in buffer.views(0, sum(lengths))]
    assert len(found) == math.ceil(sum(lengths) / (piece + 1))
    assert torch.equal(torch.cat([*found, values[:0]]), values)
