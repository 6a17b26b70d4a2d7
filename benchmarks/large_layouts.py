"""Public models on many ranks: planned, never executed.

From the models' config.json (head size 128, rope theta 1e6, none tied; the middle columns of the
mixtures are experts x ffn of one expert, 8 experts per token):

| model           | layers | hidden | ffn        | heads | KV heads | vocabulary | q, k, v  |
|-----------------|--------|--------|------------|-------|----------|------------|----------|
| Qwen2-7B        |     28 |   3584 |      18944 |    28 |        4 |     152064 | biases   |
| Qwen2.5-72B     |     80 |   8192 |      29568 |    64 |        8 |     152064 | biases   |
| Qwen3-32B       |     64 |   5120 |      25600 |    64 |        8 |     151936 | qk-norm  |
| Qwen3-30B-A3B   |     48 |   2048 |  128 x 768 |    32 |        4 |     151936 | qk-norm  |
| Qwen3-235B-A22B |     94 |   4096 | 128 x 1536 |    64 |        4 |     151936 | qk-norm  |
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TypeVar

from gpg_megatron.bridge import engine_layout
from gpg_megatron.bridge.engine_layout import Engine
from gpg_megatron.bridge.forecast import sent_elements
from gpg_megatron.bridge.plan import Bucket, Route, fingerprint, incoming, make_routes, outgoing
from gpg_megatron.config.sections import PolicyConfig
from gpg_megatron.layout.topology import PolicyGrid, held_by_policy, hf_shapes
from gpg_megatron.model.pipeline import pipeline_stages
from gpg_megatron.shapes import ModelShape, MoEShape

ITEM = 2
"""Bytes of an element: bf16."""
LIMIT = 16 * 2**20 // ITEM
"""Elements of the largest bucket, as configured by default."""
T = TypeVar("T")


def _qwen(
    architecture: str, layers: int, hidden: int, ffn: int, heads: int, kv_heads: int, vocab: int,
    *, eps: float = 1e-6, positions: int = 40960, expert_ffn: int = 0,
) -> ModelShape:  # fmt: skip
    moe = MoEShape(
        num_experts=128,
        experts_per_token=8,
        ffn_size=expert_ffn,
        shared_ffn_size=0,
        renormalised=True,
    )
    return ModelShape(
        architecture=f"{architecture}ForCausalLM",
        num_layers=layers,
        hidden_size=hidden,
        ffn_size=ffn,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=128,
        vocab_size=vocab,
        tied=False,
        qkv_bias=architecture == "Qwen2",
        qk_norm=architecture != "Qwen2",
        rope_theta=1e6,
        rms_norm_eps=eps,
        max_position_embeddings=positions,
        moe=moe if expert_ffn else None,
    )


QWEN2_7B = _qwen("Qwen2", 28, 3584, 18944, 28, 4, 152064, positions=131072)
QWEN25_72B = _qwen("Qwen2", 80, 8192, 29568, 64, 8, 152064, eps=1e-5, positions=131072)
QWEN3_32B = _qwen("Qwen3", 64, 5120, 25600, 64, 8, 151936)
QWEN3_30B = _qwen("Qwen3Moe", 48, 2048, 6144, 32, 4, 151936, expert_ffn=768)
QWEN3_235B = _qwen("Qwen3Moe", 94, 4096, 12288, 64, 4, 151936, expert_ffn=1536)


@dataclass(frozen=True, kw_only=True)
class LargeCase:
    """One policy and its engines."""

    name: str
    grid: PolicyGrid
    engine: Engine
    n_engines: int
    n_parameters: int
    """Of the model, as published with it."""

    @property
    def layout(self) -> str:
        g, e = self.grid, self.engine
        experts = f" EP{g.ep_size}" if self.engine.model.moe else ""
        engine = f"TP{e.tp_size}" + (" EP" if e.expert_parallel else "")
        return f"TP{g.tp_size} PP{g.pp_size} DP{g.dp_size}{experts} -> {self.n_engines} x {engine}"


def _case(
    name: str, model: ModelShape, n_parameters: int, n_engines: int, engine_tp: int,
    *, tp: int, dp: int, pp: int = 1, ep: int = 1, ends: int | None = None, whole: bool = False,
) -> LargeCase:  # fmt: skip
    """ends: layers of the first and of the last stage; whole: engines do not cut experts."""
    policy = PolicyConfig(
        pipeline_model_parallel_size=pp,
        num_layers_in_first_pipeline_stage=ends,
        num_layers_in_last_pipeline_stage=ends,
    )
    stages = pipeline_stages(policy, model.num_layers)
    return LargeCase(
        name=name,
        grid=PolicyGrid(tp_size=tp, dp_size=dp, pp_size=pp, ep_size=ep, stage_of_layer=stages),
        engine=Engine(model=model, tp_size=engine_tp, expert_parallel=whole),
        n_engines=n_engines,
        n_parameters=n_parameters,
    )


CASES = (
    _case("qwen2-7b", QWEN2_7B, 7_615_616_512, 8, 2, tp=4, dp=8),
    _case("qwen2.5-72b", QWEN25_72B, 72_706_203_648, 32, 8, tp=8, pp=8, dp=4),
    _case("qwen3-32b", QWEN3_32B, 32_762_123_264, 64, 8, tp=4, pp=4, dp=32),
    _case("qwen3-30b-a3b", QWEN3_30B, 30_532_122_624, 16, 8, tp=4, pp=2, dp=16, ep=8),
    _case("qwen3-235b-a22b", QWEN3_235B, 235_093_634_560, 64, 8, tp=4, pp=2, dp=128, ep=16),
    _case(
        "qwen3-235b-a22b-uneven", QWEN3_235B, 235_093_634_560, 64, 8,
        tp=4, pp=8, dp=32, ep=32, ends=11, whole=True,
    ),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Planned:
    """What every rank and every worker computes once."""

    case: LargeCase
    routes: list[Route]
    sent: Counter[int]
    """Rank -> elements that it sends to all engines."""
    needed: int
    """Elements of all parameters of all workers: the fewest that can cross."""
    seconds: dict[str, float] = field(default_factory=dict)
    """CPU seconds of each step."""

    @property
    def over_share(self) -> float:
        """Elements of the rank that sends most, over an equal share."""
        return max(self.sent.values()) * self.case.grid.world_size / self.needed


def plan(case: LargeCase) -> Planned:
    """Plan as one rank does."""
    model, grid, engine = case.engine.model, case.grid, case.engine
    seconds: dict[str, float] = {}
    shapes = _timed(seconds, "hf_shapes", lambda: hf_shapes(model))
    workers = range(engine.tp_size)
    wanted = [engine_layout.destinations(engine, shapes, worker) for worker in workers]
    held = _timed(seconds, "held", lambda: held_by_policy(model, grid))
    routes = _timed(seconds, "routes", lambda: make_routes(held, wanted))
    _timed(seconds, "fingerprint", lambda: fingerprint(routes))
    _timed(seconds, "outgoing", lambda: outgoing(routes, 0, case.n_engines, LIMIT))
    _timed(seconds, "incoming", lambda: buckets_of(routes, engine=0, worker=0))
    # These vocabularies are multiples of 64 * TP, so that the engines have no padding.
    needed = sum(
        math.prod(shape)
        for worker in workers
        for shape in engine_layout.parameter_shapes(engine, shapes, worker).values()
    )
    planned: Counter[tuple[tuple[int, ...], int, int]] = Counter()
    for route in routes:
        planned[route.ranks, route.pick, route.worker] += route.box.numel
    sent: Counter[int] = Counter()
    for (rank, _, _), n in sent_elements(planned, case.n_engines).items():
        sent[rank] += n
    return Planned(
        case=case,
        routes=routes,
        sent=sent,
        needed=needed * case.n_engines,
        seconds=seconds,
    )


def buckets_of(routes: Iterable[Route], *, engine: int, worker: int) -> dict[int, list[Bucket]]:
    """What a worker receives, by sender."""
    return incoming((route for route in routes if route.worker == worker), engine, LIMIT)


def _timed(seconds: dict[str, float], name: str, make: Callable[[], T]) -> T:
    begin = time.process_time()
    result = make()
    seconds[name] = time.process_time() - begin
    return result
