"""Where vLLM's workers keep the tensors of Qwen and Llama models, without an engine to ask.

The bridge itself records what an engine's loaders really do (install.py). This description is for
plans of engines that do not run: dry runs and benchmarks. Per worker of t:

    qkv_proj        [heads/t of q; k; v]; with more workers than key-value heads, copies of them
    gate_up_proj    [rows of gate; rows of up]
    o_proj, down    columns
    embeddings      rows of a vocabulary padded to a multiple of 64
    experts         w13 [E, gate and up, hidden], w2 [E, hidden, ffn]; whole experts with
                    expert parallelism, otherwise cut like a dense MLP
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod

from gpg_megatron.bridge.plan import Destination, View
from gpg_megatron.layout.boxes import Box
from gpg_megatron.types import ModelShape

VOCAB_UNIT = 64
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
    return [
        Destination(name, Box(hf), _view(parameter, shape, corner, Box(hf).shape))
        for name, whole in hf_shapes.items()
        for parameter, shape, corner, hf in _places(engine, name, whole, worker)
    ]


def parameter_shapes(
    engine: Engine, hf_shapes: Mapping[str, tuple[int, ...]], worker: int
) -> dict[str, tuple[int, ...]]:
    """Every parameter of one worker."""
    return {
        parameter: shape
        for name, whole in hf_shapes.items()
        for parameter, shape, _, _ in _places(engine, name, whole, worker)
    }


_Ranges = tuple[tuple[int, int], ...]
_Place = tuple[str, tuple[int, ...], tuple[int, ...], _Ranges]
"""Parameter, its shape, first element there, box of the Hugging Face tensor."""


def _places(engine: Engine, name: str, whole: tuple[int, ...], worker: int) -> Iterator[_Place]:
    """Where a tensor lives in a worker; nowhere, when it is another worker's expert."""
    tp, tail = engine.tp_size, whole[1:]
    rest = tuple((0, n) for n in tail)
    if expert := EXPERT.fullmatch(name):
        yield from _expert_places(engine, expert, whole, worker)
    elif name in ("model.embed_tokens.weight", "lm_head.weight"):
        n, end = engine.vocab_rows, whole[0]
        first, stop = min(worker * n, end), min((worker + 1) * n, end)
        yield name, (n, *tail), (0, 0), ((first, stop), *rest)
    elif found := re.search(r"\.([qkv])_proj\.", name):
        d, letter = engine.model.head_dim, found[1]
        q, kv = engine.model.num_heads // tp * d, engine.kv_heads * d
        first = worker * q if letter == "q" else engine.first_kv_head(worker) * d
        n = q if letter == "q" else kv
        corner = {"q": 0, "k": q, "v": q + kv}[letter]
        parameter = name.replace(f".{letter}_proj.", ".qkv_proj.")
        yield (
            parameter,
            (q + 2 * kv, *tail),
            (corner, *[0] * len(tail)),
            ((first, first + n), *rest),
        )
    elif found := re.search(r"\.(gate|up)_proj\.", name):
        n = whole[0] // tp
        corner = n * (found[1] == "up")
        parameter = name.replace(f".{found[1]}_proj.", ".gate_up_proj.")
        yield parameter, (2 * n, *tail), (corner, 0), ((worker * n, (worker + 1) * n), *rest)
    elif re.search(r"\.(o|down)_proj\.", name):
        n = whole[1] // tp
        yield name, (whole[0], n), (0, 0), ((0, whole[0]), (worker * n, (worker + 1) * n))
    else:
        yield name, whole, (0,) * len(whole), ((0, whole[0]), *rest)


def _expert_places(
    engine: Engine, found: re.Match[str], whole: tuple[int, ...], worker: int
) -> Iterator[_Place]:
    prefix, number, kind = found[1], int(found[2]), found[3]
    n_experts, cuts, part = engine.model.num_experts, engine.tp_size, worker
    if engine.expert_parallel:
        n_experts, cuts, part = n_experts // engine.tp_size, 1, 0
        number -= worker * n_experts
        if not 0 <= number < n_experts:
            return
    if kind == "down":
        n = whole[1] // cuts
        hf = ((0, whole[0]), (part * n, (part + 1) * n))
        yield f"{prefix}.routed_experts.w2_weight", (n_experts, whole[0], n), (number, 0, 0), hf
    else:
        n = whole[0] // cuts
        hf = ((part * n, (part + 1) * n), (0, whole[1]))
        corner = (number, n * (kind == "up"), 0)
        yield f"{prefix}.routed_experts.w13_weight", (n_experts, 2 * n, whole[1]), corner, hf


def _view(
    parameter: str, shape: tuple[int, ...], corner: tuple[int, ...], extent: tuple[int, ...]
) -> View:
    strides = tuple(prod(shape[i + 1 :]) for i in range(len(shape)))
    offset = sum(c * s for c, s in zip(corner, strides, strict=True))
    return View(parameter, offset, extent, strides[len(shape) - len(extent) :])
