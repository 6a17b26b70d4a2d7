"""The parameters of vLLM's workers, cut and stacked from whole tensors.

The same layout as gpg_megatron/bridge/engine_layout.py, written a second time and in another way:
what one says is checked against the other.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np

from gpg_megatron.bridge.engine_layout import EXPERT, Engine

PADDING = -1.0


def weights(engine: Engine, hf: Mapping[str, np.ndarray], worker: int) -> dict[str, np.ndarray]:
    """The parameters of one worker, cut from whole tensors; PADDING where no tensor is."""
    result: dict[str, np.ndarray] = {}
    for name, tensor in hf.items():
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            padded = np.full((engine.vocab_rows * engine.tp_size, tensor.shape[1]), PADDING)
            padded[: len(tensor)] = tensor
            result[name] = np.split(padded, engine.tp_size)[worker]
        elif ".q_proj." in name:
            k, v = (_heads(engine, hf[name.replace(".q_", f".{x}_")], worker) for x in "kv")
            q = np.split(tensor, engine.tp_size)[worker]
            result[name.replace(".q_", ".qkv_")] = np.concatenate([q, k, v])
        elif ".linear_attn." in name:
            parameter, value = _delta_net(engine, hf, name, worker)
            if parameter:
                result[parameter] = value
        elif EXPERT.fullmatch(name):
            continue
        elif ".gate_up_proj." in name:
            gate, up = np.split(tensor, 2)
            result[name] = _gated(gate, up, engine.tp_size, worker)
        elif ".gate_proj." in name:
            up = hf[name.replace(".gate_", ".up_")]
            result[name.replace(".gate_", ".gate_up_")] = _gated(tensor, up, engine.tp_size, worker)
        elif re.search(r"\.(o|down)_proj\.weight", name):
            result[name] = np.split(tensor, engine.tp_size, axis=1)[worker]
        elif not re.search(r"\.(k|v|up)_proj\.", name):
            result[name] = tensor
    for layer in set(range(engine.model.num_layers)) - set(engine.model.dense_layers):
        prefix = f"model.layers.{layer}.mlp.experts"
        w13, w2 = _experts(engine, hf, prefix, worker)
        result[f"{prefix}.routed_experts.w13_weight"] = w13
        result[f"{prefix}.routed_experts.w2_weight"] = w2
    return result


def _heads(engine: Engine, tensor: np.ndarray, worker: int) -> np.ndarray:
    """The key or value heads of a worker."""
    heads = np.split(tensor, engine.model.num_kv_heads)
    first = engine.first_kv_head(worker)
    return np.concatenate(heads[first : first + engine.kv_heads])


def _delta_net(
    engine: Engine, hf: Mapping[str, np.ndarray], name: str, worker: int
) -> tuple[str, np.ndarray]:
    """The parameter that the tensor is first in, by its name; none: it is not the first."""
    delta, tp = engine.model.delta, engine.tp_size
    assert delta
    borders = [delta.key_width, 2 * delta.key_width]

    def stacked(parts: Sequence[np.ndarray]) -> np.ndarray:
        return np.concatenate([np.split(part, tp)[worker] for part in parts])

    if name.endswith(".norm.weight"):
        return name, hf[name]
    if name.endswith("out_proj.weight"):
        return name, np.split(hf[name], tp, axis=1)[worker]
    if name.endswith("conv1d.weight"):
        return name, stacked(np.split(hf[name], borders))
    if name.endswith("_qkv.weight"):
        parts = [*np.split(hf[name], borders), hf[name.replace("_qkv", "_z")]]
        return name.replace("_qkv", "_qkvz"), stacked(parts)
    if name.endswith("_b.weight"):
        return name.replace("_b.", "_ba."), stacked([hf[name], hf[name.replace("_b.", "_a.")]])
    return (
        ("", hf[name]) if name.endswith(("_z.weight", "_a.weight")) else (name, stacked([hf[name]]))
    )


def _gated(gate: np.ndarray, up: np.ndarray, parts: int, part: int) -> np.ndarray:
    return np.concatenate([np.split(gate, parts)[part], np.split(up, parts)[part]])


def _experts(
    engine: Engine, hf: Mapping[str, np.ndarray], prefix: str, worker: int
) -> tuple[np.ndarray, np.ndarray]:
    """(w13, w2) of one layer."""
    numbers: Sequence[int] = range(engine.model.num_experts)
    parts, part = engine.tp_size, worker
    if engine.expert_parallel:
        numbers = np.split(np.array(numbers), parts)[part].tolist()
        parts, part = 1, 0
    w13, w2 = [], []
    for number in numbers:
        gate, up, down = (
            hf[f"{prefix}.{number}.{kind}_proj.weight"] for kind in ("gate", "up", "down")
        )
        w13.append(_gated(gate, up, parts, part))
        w2.append(np.split(down, parts, axis=1)[part])
    return np.stack(w13), np.stack(w2)
