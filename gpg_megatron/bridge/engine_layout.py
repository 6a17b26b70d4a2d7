"""Where vLLM's workers keep the tensors of each family, without an engine to ask.

The bridge itself records what an engine's loaders really do (install.py). This description is for
plans of engines that do not run: dry runs and benchmarks. Per worker of t:

    qkv_proj        [heads/t of q; k; v]; with more workers than key-value heads, copies of them
    linear_attn     in_proj_qkvz [q; k; v; gate], in_proj_ba [b; a] and conv1d [q; k; v], each part
                    of this worker's heads; those that the checkpoint has by key head as they are
    gate_up_proj    [rows of gate; rows of up]
    o_proj, down    columns
    embeddings      rows of a vocabulary padded to a multiple of 64
    fused_qkv_a     [q_a; kv_a] of latent attention, whole; q_b and kv_b are rows
    experts         w13 [E, gate and up, hidden], w2 [E, hidden, ffn]; whole experts with
                    expert parallelism, otherwise cut like a dense MLP
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

from gpg_megatron.bridge.plan import Destination, View
from gpg_megatron.layout.boxes import Box
from gpg_megatron.shapes import ModelShape

VOCAB_UNIT = 64
LATENT = re.compile(r"\.(q|q_a|q_b|kv_a|kv_b)_proj\w*\.weight")
EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """One vLLM engine."""

    model: ModelShape
    tp_size: int
    expert_parallel: bool = False

    @property
    def vocab_rows(self) -> int:
        """Of one worker, padding included."""
        padded = -(-self.model.vocab_size // VOCAB_UNIT) * VOCAB_UNIT
        assert padded % self.tp_size == 0
        return padded // self.tp_size

    @property
    def kv_heads(self) -> int:
        """Of one worker."""
        return max(1, self.model.num_kv_heads // self.tp_size)

    def first_kv_head(self, worker: int) -> int:
        return worker * self.model.num_kv_heads // self.tp_size


def destinations(
    engine: Engine, hf_shapes: Mapping[str, tuple[int, ...]], worker: int
) -> list[Destination]:
    """What the loaders of one worker do, in the order in which they are given the tensors."""
    places = _places(engine, hf_shapes, worker)
    return [Destination(name, hf, view) for name, _, hf, view in places]


def parameter_shapes(
    engine: Engine, hf_shapes: Mapping[str, tuple[int, ...]], worker: int
) -> dict[str, tuple[int, ...]]:
    """Every parameter of one worker."""
    places = _places(engine, hf_shapes, worker)
    return {view.parameter: shape for _, shape, _, view in places}


_Place = tuple[tuple[int, ...], Box, View]
"""Shape of the whole parameter, box of the Hugging Face tensor, where it lives."""


def _places(
    engine: Engine, hf_shapes: Mapping[str, tuple[int, ...]], worker: int
) -> Iterator[tuple[str, *_Place]]:
    experts = _Experts(engine, worker)
    for name, whole in hf_shapes.items():
        if found := EXPERT.fullmatch(name):
            if where := experts.place(found, whole):
                yield name, *where
            continue
        if name.endswith(".gate_up_proj.weight"):
            n = whole[0] // 2 // engine.tp_size
            for part in range(2):
                first = part * whole[0] // 2 + worker * n
                yield name, *_cut(name, whole, first, n, at=part * n, of=2 * n)
            continue
        if ".linear_attn." in name:
            for where in _delta_net(engine, name, whole, worker):
                yield name, *where
            continue
        yield name, *_dense(engine, name, whole, worker)


def _cut(
    parameter: str, whole: Sequence[int], first: int, n: int,
    *, dimension: int = 0, at: int = 0, of: int | None = None,
) -> _Place:  # fmt: skip
    """[first, first + n) of one dimension of a tensor, which begin at `at` of the parameter's
    `of`; None: they are all of it."""
    ranges = [(0, size) for size in whole]
    ranges[dimension] = (first, first + n)
    shape = (*whole[:dimension], of or n, *whole[dimension + 1 :])
    strides = tuple(prod(shape[i + 1 :]) for i in range(len(shape)))
    hf = Box(tuple(ranges))
    return shape, hf, View(parameter, at * strides[dimension], hf.shape, strides)


def _dense(engine: Engine, name: str, whole: Sequence[int], worker: int) -> _Place:
    tp = engine.tp_size
    if name in ("model.embed_tokens.weight", "lm_head.weight"):
        rows = engine.vocab_rows
        first, stop = (min(w * rows, whole[0]) for w in (worker, worker + 1))
        return _cut(name, whole, first, stop - first, of=rows)
    if engine.model.latent is not None and (found := LATENT.search(name)):
        return _latent(engine, name, found[1], whole, worker)
    if found := re.search(r"\.([qkv])_proj\.", name):
        d, letter = engine.model.head_dim, found[1]
        q = engine.model.num_heads * (1 + engine.model.output_gate) // tp * d
        kv = engine.kv_heads * d
        first, n = (worker * q, q) if letter == "q" else (engine.first_kv_head(worker) * d, kv)
        at = {"q": 0, "k": q, "v": q + kv}[letter]
        parameter = name.replace(f".{letter}_proj.", ".qkv_proj.")
        return _cut(parameter, whole, first, n, at=at, of=q + 2 * kv)
    if found := re.search(r"\.(gate|up)_proj\.", name):
        n = whole[0] // tp
        parameter = name.replace(f".{found[1]}_proj.", ".gate_up_proj.")
        return _cut(parameter, whole, worker * n, n, at=n * (found[1] == "up"), of=2 * n)
    if re.search(r"\.(o|down)_proj\.weight", name):
        n = whole[1] // tp
        return _cut(name, whole, worker * n, n, dimension=1)
    return _cut(name, whole, 0, whole[0])


def _delta_net(engine: Engine, name: str, whole: Sequence[int], worker: int) -> Iterator[_Place]:
    delta, tp = engine.model.delta, engine.tp_size
    assert delta
    keys, values = delta.key_width, delta.value_width
    prefix, _, kind = name.rpartition(".linear_attn.")
    if kind == "norm.weight":
        yield _cut(name, whole, 0, whole[0])
        return
    if kind == "out_proj.weight":
        n = whole[1] // tp
        yield _cut(name, whole, worker * n, n, dimension=1)
        return
    parameter, parts, at, of = {
        "conv1d.weight": (kind, (keys, keys, values), 0, 2 * keys + values),
        "in_proj_qkv.weight": ("in_proj_qkvz.weight", (keys, keys, values), 0, 2 * (keys + values)),
        "in_proj_z.weight": (
            "in_proj_qkvz.weight", (values,), 2 * keys + values, 2 * (keys + values)
        ),
        "in_proj_b.weight": ("in_proj_ba.weight", whole[:1], 0, 2 * whole[0]),
        "in_proj_a.weight": ("in_proj_ba.weight", whole[:1], whole[0], 2 * whole[0]),
    }.get(kind, (kind, whole[:1], 0, whole[0]))  # fmt: skip
    first = 0
    for rows in parts:
        n = rows // tp
        yield _cut(
            f"{prefix}.linear_attn.{parameter}", whole, first + worker * n, n,
            at=(at + first) // tp, of=of // tp,
        )  # fmt: skip
        first += rows


def _latent(engine: Engine, name: str, kind: str, whole: Sequence[int], worker: int) -> _Place:
    """Of attention over compressed keys and values."""
    assert engine.model.latent is not None
    if kind in ("q", "q_b", "kv_b"):
        n = whole[0] // engine.tp_size
        return _cut(name, whole, worker * n, n)
    q_rank = engine.model.latent.q_rank
    if not q_rank:
        return _cut(name, whole, 0, whole[0])
    fused = name[: name.rindex(f"{kind}_proj")] + "fused_qkv_a_proj.weight"
    n_kv = engine.model.latent.kv_rank + engine.model.latent.rope_dim
    return _cut(fused, whole, 0, whole[0], at=q_rank * (kind == "kv_a"), of=q_rank + n_kv)


class _Experts:
    """Of one worker: as a dense MLP, at the expert's number. They are alike, and models have tens
    of thousands."""

    def __init__(self, engine: Engine, worker: int) -> None:
        self._first, self._number = 0, engine.model.num_experts
        if engine.expert_parallel:
            self._number //= engine.tp_size
            self._first = worker * self._number
            engine, worker = replace(engine, tp_size=1), 0
        self._one = functools.cache(
            lambda letter, whole: _dense(engine, f".{letter}_proj.weight", whole, worker)
        )

    def place(self, found: re.Match[str], whole: tuple[int, ...]) -> _Place | None:
        """None: it is another worker's."""
        number = int(found[2]) - self._first
        if not 0 <= number < self._number:
            return None
        shape, hf, view = self._one(found[3], whole)
        parameter = f"{found[1]}.routed_experts.{'w2' if found[3] == 'down' else 'w13'}_weight"
        offset = number * prod(shape) + view.offset
        return (self._number, *shape), hf, View(parameter, offset, view.shape, view.stride)
