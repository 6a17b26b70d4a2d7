"""What a run keeps on this host fits, by numbers; and what --check says."""

from __future__ import annotations

import json
import math
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from gpg_megatron.config.bridge import BridgeConfig
from gpg_megatron.config.sections import (
    CheckpointConfig,
    Config,
    DataConfig,
    PolicyConfig,
    RolloutConfig,
)
from gpg_megatron.errors import UserError
from gpg_megatron.host.reaper import scratch_directory
from gpg_megatron.model.shape import load_model_shape
from gpg_megatron.shapes import ModelShape
from gpg_megatron.start import train
from gpg_megatron.start.room import Room, check_room, checkpoint_bytes
from tests.saved_before.problem import MODEL, STEP
from tests.saved_before.problem import config as saved_config
from tests.tiny import make_tiny_model, write_problems

MIB = 2**20
SHAPE = ModelShape(
    architecture="Qwen2ForCausalLM",
    num_layers=4,
    hidden_size=128,
    ffn_size=256,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    vocab_size=320,
    tied=True,
    qkv_bias=True,
    qk_norm=False,
    rope_theta=1e4,
    rms_norm_eps=1e-6,
    max_position_embeddings=512,
)
CONFIG = Config(
    data=DataConfig(max_prompt_length=200),
    rollout=RolloutConfig(max_response_length=100, kv_cache_gb=384 * 1024 / 2**30),
    policy=PolicyConfig(data_parallel_size=2),
    bridge=BridgeConfig(bucket_mb=8),
    checkpoint=CheckpointConfig(save_freq=1),
)
PARAMETERS = 384 * 128 + 4 * (128 * 256 + 256 + 128 * 128 + 3 * 128 * 256 + 2 * 128) + 128
ENOUGH = Room(shared_memory=32 * MIB, output=14 * PARAMETERS)


def checked(config: Config, room: Room, *, on_cpu: bool = True) -> None:
    check_room(config, SHAPE, room, n_ranks=2, on_cpu=on_cpu)


def test_what_just_fits() -> None:
    """300 tokens are 3 blocks of 128, each token 2 x 4 x 2 x 32 x 2 bytes; two ranks with two
    buckets; bf16 parameters with fp32 master weights and moments, 320 rows padded to 384."""
    assert checkpoint_bytes(CONFIG, SHAPE) == 14 * PARAMETERS
    checked(CONFIG, ENOUGH)


def test_what_just_does_not() -> None:
    cache = replace(CONFIG.rollout, kv_cache_gb=383 * 1024 / 2**30)
    small = replace(CONFIG, rollout=cache)
    with pytest.raises(UserError, match="383 tokens, and one sequence may have 300; expected at l"):
        checked(small, ENOUGH)
    checked(small, ENOUGH, on_cpu=False)
    with pytest.raises(UserError, match="/dev/shm has 31 MiB free, and 2 policy ranks with 2 buck"):
        checked(CONFIG, replace(ENOUGH, shared_memory=31 * MIB))
    gloo = replace(CONFIG, bridge=replace(CONFIG.bridge, transport="gloo"))
    checked(gloo, replace(ENOUGH, shared_memory=0))
    with pytest.raises(UserError, match="disk has 5 MiB free, and the first checkpoint takes"):
        checked(CONFIG, replace(ENOUGH, output=5 * MIB))
    never = replace(CONFIG, checkpoint=CheckpointConfig())
    checked(never, replace(ENOUGH, output=0))
    exported = replace(CONFIG, checkpoint=CheckpointConfig(save_freq=1, hf_export="every"))
    with pytest.raises(UserError, match="disk has"):
        checked(exported, ENOUGH)


def test_a_real_checkpoint_is_that_large() -> None:
    """Of an fp32 model, written by two tensor-parallel ranks."""
    found = FileSystemReader(STEP).read_metadata().state_dict_metadata.values()
    tensors = [x for x in found if isinstance(x, TensorStorageMetadata)]
    size = sum(math.prod(x.size) * x.properties.dtype.itemsize for x in tensors)
    shape = load_model_shape(MODEL, need_weights=False)
    assert 0.98 * size < checkpoint_bytes(saved_config(2, Path("run")), shape) <= size


@pytest.mark.parametrize("name", ["with a space", "x" * 60])
def test_the_scratch_folder_is_one_that_ray_can_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / name))
    assert scratch_directory("0123456789ab") == Path("/tmp/gpg-0123456789ab")
    monkeypatch.setattr(tempfile, "tempdir", "/var/tmp")
    assert scratch_directory("0123456789ab") == Path("/var/tmp/gpg-0123456789ab")


def test_check_says_what_it_found_and_starts_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("gpg_megatron.start.world.start_reaper", lambda *_: pytest.fail("began"))
    make_tiny_model(tmp_path / "model")
    write_problems(tmp_path / "train.jsonl", ["1+1=", "12+12="])
    settings = {
        "data": {"train_files": ["train.jsonl"], "apply_chat_template": False},
        "rollout": {"max_response_length": 100},
        "trainer": {"output_dir": "run", "device": "cpu"},
        "model": {"path": "model"},
    }
    Path("config.yaml").write_text(json.dumps(settings))
    given = ["--config", "config.yaml", "--check", "data.max_prompt_length=8"]
    assert train.main(given) == 0
    out, err = capsys.readouterr()
    err = "".join(x for x in err.splitlines() if "Writing model shards" not in x)
    assert err == "" and not Path("run").exists()
    assert out.splitlines() == [
        "model      Qwen2ForCausalLM, 2 layers, vocabulary of 320",
        "prompts    2 to train on, 0 held out, 0 too long; the longest has 6 tokens",
        "scorers    exact_match 2",
        "goes from  the beginning to step 100",
        "checked    nothing is known that would keep the run from starting",
    ]
    assert train.main([*given, "data.max_prompt_length=4"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: train.jsonl:2: the prompt has 6 tokens")
