"""What a save and a resume take of host memory, on real ranks with a distributed optimizer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.dist.ranks import run_ranks

MIB = 1 << 20
CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 16384,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
}
LARGEST_CHUNK = 4 * CONFIG["vocab_size"] * CONFIG["hidden_size"]  # type: ignore[operator]
"""Bytes of the embedding's fp32 state."""
NOISE = 24 * MIB
"""Threads, buffers of sockets and files, modules imported on the way."""


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_rank_copies_what_it_writes_and_reads_piece_by_piece(tmp_path: Path, size: int) -> None:
    """No rank ever holds another one's share."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(CONFIG))
    output = run_ranks(tmp_path, "tests.dist.memory_worker", size)
    paths = [tmp_path / f"dp{size}-rank{rank}.json" for rank in range(size)]
    assert all(path.exists() for path in paths), output
    ranks = [json.loads(path.read_text()) for path in paths]
    print(*ranks, sep="\n")
    for rank, found in enumerate(ranks):
        # Replicas hold the same parameters: one of them writes them.
        held = found["optimizer"] + (found["parameters"] if rank == 0 else 0)
        assert held <= found["written"] <= held + MIB
        assert found["save_peak"] <= held + NOISE
        # The reader lets go of a piece when it has the next one.
        assert found["resume_peak"] <= 2 * LARGEST_CHUNK + NOISE
    # The whole is far above all of these limits: to gather it would be seen.
    whole = sum(found["optimizer"] for found in ranks)
    assert whole == 6 * ranks[0]["parameters"]
    assert whole > 2 * LARGEST_CHUNK + NOISE
