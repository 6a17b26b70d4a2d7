"""A packed row cut into chunks for a recurrence: a pure function of the packing.

    row:     | prompt A | response A1 | response A2 | sequence B |
    waves    A and B, each from a state of zero; then A1 and A2, each from the last state of A
    rounds   the first chunk of every segment of a wave, then the second of those that have one, ...

A round is one batched step, from the states of its segments to their next ones. Within a wave the
longer segments stand first, so those that go on are the first states of the round before.

Shape legend: T tokens of the row, N chunks of C positions, B positions at borders.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch

from gpg_megatron.host.device import Device, send
from gpg_megatron.policy.spans import Span

LONGEST = 64
"""Positions of a chunk, at most. Its work grows with the square, that between chunks falls."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wave:
    """Segments that can be computed beside each other."""

    n_active: tuple[int, ...]
    """Of each round the segments that have a chunk in it."""
    parents: torch.Tensor | None
    """int64 [segments], the place in the first wave of the prompt that each goes on from, which is
    there in the order in which segments end; None: they begin with a state of zero."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunks:
    """A row in chunks, wave by wave and round by round, and what a convolution sees at borders."""

    row_NC: torch.Tensor
    """int64 [N, C], the position in the row of each; T where a chunk is filled up."""
    place_T: torch.Tensor
    """int64 [T], where each position of the row stands among the N * C."""
    waves: tuple[Wave, ...]
    border_B: torch.Tensor
    """int64 [B], positions whose last predecessors do not all stand before them in the row."""
    before_KB: torch.Tensor
    """int64 [kernel, B], their predecessors and they themselves, the farthest first; T: none."""


def chunks_of(spans: Sequence[Span], n_tokens: int, kernel: int) -> Chunks:
    """The chunks of a whole row, on the CPU.

    Args:
        kernel: tokens that the convolution sees, the present one included.
    """
    segments = [
        (begin, begin + span.length, span.prompt)
        for span in spans
        for begin in range(span.start, span.start + span.n * span.length, span.length)
    ]
    size = min(LONGEST, max(stop - start for start, stop, _ in segments))
    chunks: list[tuple[int, int]] = []
    waves, ended = [], {}
    for follows in (False, True):
        wave = [segment for segment in segments if (segment[2] is not None) == follows]
        if not wave:
            continue
        wave.sort(key=lambda segment: segment[0] - segment[1])
        n_active = []
        for first in range(0, wave[0][1] - wave[0][0], size):
            active = [(start + first, stop) for start, stop, _ in wave if start + first < stop]
            n_active.append(len(active))
            chunks += active
        if not follows:
            # The shorter ones, which stand last, end first.
            by_end = sorted(wave, key=lambda segment: -((segment[0] - segment[1]) // size))
            ended = {start: place for place, (start, _, _) in enumerate(by_end)}
        parents = [ended[prompt[0]] for _, _, prompt in wave if prompt]
        waves.append(
            Wave(n_active=tuple(n_active), parents=torch.tensor(parents) if follows else None)
        )
    begin_N, stop_N = torch.tensor(chunks).unbind(1)
    row_NC = begin_N.unsqueeze(1) + torch.arange(size)
    row_NC[row_NC >= stop_N.unsqueeze(1)] = n_tokens
    place_T = torch.empty(n_tokens + 1, dtype=torch.int64)
    place_T[row_NC.flatten()] = torch.arange(row_NC.numel())
    border_B, before_KB = _borders(segments, n_tokens, kernel)
    return Chunks(
        row_NC=row_NC,
        place_T=place_T[:-1],
        waves=tuple(waves),
        border_B=border_B,
        before_KB=before_KB,
    )


def _borders(
    segments: Sequence[tuple[int, int, tuple[int, int] | None]], n_tokens: int, kernel: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """border_B and before_KB."""
    borders, before = [], []
    for start, stop, prompt in segments:
        begin, end = prompt or (0, 0)
        earlier = list(range(max(begin, end - kernel + 1), end))
        earlier = [n_tokens] * (kernel - 1 - len(earlier)) + earlier
        first = list(range(start, min(stop, start + kernel - 1)))
        sequence = earlier + first
        borders += first
        before += [sequence[i : i + kernel] for i in range(len(first))]
    border_B = torch.tensor(borders, dtype=torch.int64)
    before_BK = torch.tensor(before, dtype=torch.int64).view(len(borders), kernel)
    return border_B, before_BK.T.contiguous()


def sent(chunks: Chunks, device: Device) -> Chunks:
    """The same on a device."""
    waves = tuple(
        wave if wave.parents is None else replace(wave, parents=send(wave.parents, device))
        for wave in chunks.waves
    )
    tensors = {
        field.name: send(value, device)
        for field in fields(chunks)
        if isinstance(value := getattr(chunks, field.name), torch.Tensor)
    }
    return replace(chunks, waves=waves, **tensors)
