"""Hugging Face -> Megatron -> Hugging Face: the same bytes, or one clear line."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from checkpoint_convert.__main__ import main
from gpg_megatron.checkpoint import to_hf
from gpg_megatron.checkpoint.compare import compare
from gpg_megatron.checkpoint.marker import read_marker
from gpg_megatron.checkpoint.store import relative_files
from gpg_megatron.checkpoint.to_hf import megatron_to_hf
from gpg_megatron.checkpoint.to_megatron import hf_to_megatron
from gpg_megatron.checkpoint.torch_dist import read_index
from gpg_megatron.errors import UserError
from gpg_megatron.layout.topology import PolicyGrid
from gpg_megatron.model.shape import load_model_shape
from tests.tiny import Family, make_tiny_model

FAMILIES: list[tuple[Family, bool]] = [
    ("qwen2", True),
    ("qwen2", False),
    ("qwen3", True),
    ("llama", False),
    ("mistral", True),
    ("glm4", False),
    ("qwen3_moe", False),
    ("qwen2_moe", True),
    ("qwen3_5_text", True),
    ("qwen3_5_moe_text", False),
    ("qwen3_next", False),
    ("glm4_moe", False),
    ("deepseek_v2", False),
    ("deepseek_v3", False),
]
LAYOUTS = [(1, 1, 1), (2, 1, 1), (2, 2, 2), (4, 2, 1)]


def grid(tp: int = 1, pp: int = 1, ep: int = 1, layers: int = 4) -> PolicyGrid:
    stages = tuple(i * pp // layers for i in range(layers))
    return PolicyGrid(tp_size=tp, dp_size=ep, pp_size=pp, stage_of_layer=stages, ep_size=ep)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[Family, bool], Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        (family, tied): make_tiny_model(
            root / f"{family}_{tied}", family=family, tied=tied, num_layers=4, vocab_size=301
        )
        for family, tied in FAMILIES
    }


@pytest.fixture
def model(models: dict[tuple[Family, bool], Path]) -> Path:
    return models["qwen2", True]


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in directory.glob("*.safetensors"):
        found |= load_file(path)
    return found


@pytest.mark.parametrize(
    "key", FAMILIES, ids=lambda key: f"{key[0]}-{'tied' if key[1] else 'untied'}"
)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda x: "tp{}pp{}ep{}".format(*x))
def test_there_and_back_gives_the_same_bytes(
    models: dict[tuple[Family, bool], Path],
    key: tuple[Family, bool],
    layout: tuple[int, int, int],
    tmp_path: Path,
) -> None:
    tp, pp, ep = layout
    source = models[key]
    has_experts = key[0].endswith(("moe", "v2", "v3", "moe_text", "next"))
    hf_to_megatron(source, tmp_path / "m", grid=grid(tp, pp, ep if has_experts else 1))
    megatron_to_hf(tmp_path / "m", tmp_path / "h")
    right, found = tensors(source), tensors(tmp_path / "h")
    assert right.keys() == found.keys()
    for name in right:
        assert right[name].dtype == found[name].dtype
        assert torch.equal(right[name], found[name]), name
    weights = ("model.safetensors", "model.safetensors.index.json")
    for name in set(relative_files(source)) - set(weights):
        assert (source / name).read_bytes() == (tmp_path / "h" / name).read_bytes()
    result = compare(source, tmp_path / "m")
    assert result.keys() == right.keys() and all(result.values())


def test_files_are_split_as_the_ranks_would(
    models: dict[tuple[Family, bool], Path], tmp_path: Path
) -> None:
    hf_to_megatron(models["qwen3_moe", False], tmp_path / "m", grid=grid(2, 2, 2))
    ranks = {int(p.name.split("_")[2]) for p in (tmp_path / "m").glob("*.distcp")}
    assert ranks == set(range(8))
    index = read_index(tmp_path / "m")
    expert = index["decoder.layers.mlp.experts.experts.linear_fc2.weight"]
    for chunk in expert.chunks:
        (layer, _), (number, _), _, (column, _) = chunk.box.ranges
        rank = int(chunk.file.split("_")[2])
        assert rank == (column > 0) + 2 * (number // 2) + 4 * (layer // 2)


def test_both_vocabulary_sizes_are_recorded(model: Path, tmp_path: Path) -> None:
    hf_to_megatron(model, tmp_path / "m", grid=grid(tp=4))
    marker = read_marker(tmp_path / "m")
    assert (marker.model["vocab_size"], marker.padded_vocab_size) == (301, 512)
    stored = read_index(tmp_path / "m")["embedding.word_embeddings.weight"]
    assert stored.shape == (512, 128)


def test_a_cast_on_the_way(model: Path, tmp_path: Path) -> None:
    hf_to_megatron(model, tmp_path / "m", grid=grid(), dtype=torch.bfloat16)
    assert read_marker(tmp_path / "m").dtype == "bfloat16"
    megatron_to_hf(tmp_path / "m", tmp_path / "h")
    for name, right in tensors(model).items():
        assert torch.equal(tensors(tmp_path / "h")[name], right.bfloat16())
    assert json.loads((tmp_path / "h" / "config.json").read_text())["dtype"] == "bfloat16"
    assert all(compare(model, tmp_path / "m").values())


def changed(model: Path, directory: Path, **added: torch.Tensor) -> Path:
    """A copy of the model with tensors of its file added or replaced."""
    copy = copy_of(model, directory)
    save_file(tensors(model) | added, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


def test_block_fp8_becomes_numbers(
    models: dict[tuple[Family, bool], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As DeepSeek-V3 is published: matrices in FP8 with a scale for each block, here of 48 rows and
    40 columns, which divide no matrix; a router, its bias and a layer of further tokens."""
    source, fp8 = (
        models["deepseek_v3", False],
        copy_of(models["deepseek_v3", False], tmp_path / "q"),
    )
    rows, columns = 48, 40
    right = tensors(source)
    stored: dict[str, torch.Tensor] = {}
    for name, value in right.items():
        if value.dim() < 2 or "embed" in name or "head" in name or ".mlp.gate." in name:
            stored[name] = value
            continue
        scales = torch.rand(-(-len(value) // rows), -(-value.shape[1] // columns)) + 0.5
        wide = scales.repeat_interleave(rows, 0)[: len(value)]
        wide = wide.repeat_interleave(columns, 1)[:, : value.shape[1]]
        stored[name] = (value / wide).to(torch.float8_e4m3fn)
        stored[name + "_scale_inv"] = scales
        right[name] = (stored[name].float() * wide).bfloat16().float()
    stored["model.layers.4.mlp.down_proj.weight"] = torch.ones(3, 3)
    save_file(stored, fp8 / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((fp8 / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [rows, columns],
    }  # fmt: skip
    (fp8 / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="quantised weights"):
        load_model_shape(fp8)
    to, back = str(tmp_path / "m"), str(tmp_path / "h")
    assert main(["hf-to-megatron", "--hf", str(fp8), "--megatron", to, "--tp", "2"]) == 0
    assert main(["megatron-to-hf", "--megatron", to, "--hf", back]) == 0
    found = tensors(tmp_path / "h")
    assert found.keys() == right.keys()
    for name, value in right.items():
        assert torch.equal(found[name].float(), value), name
    assert "quantization_config" not in json.loads((tmp_path / "h" / "config.json").read_text())
    load_model_shape(tmp_path / "h")
    assert all(compare(fp8, tmp_path / "m").values())


def test_a_value_that_the_type_cannot_hold(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    norm = torch.full((128,), 1e6)
    large = changed(model, tmp_path / "large", **{"model.norm.weight": norm})
    words = "model.norm.weight has the value 1e+06, which float16 cannot hold (at most 65504)"
    arguments = ["hf-to-megatron", "--hf", str(large), "--megatron", str(tmp_path / "m")]
    expect_refusal(capsys, [*arguments, "--dtype", "fp16"], words)
    assert list((tmp_path / "m").iterdir()) == [], "half a checkpoint was left"
    assert main(arguments) == 0
    arguments = ["megatron-to-hf", "--megatron", str(tmp_path / "m"), "--hf", str(tmp_path / "h")]
    expect_refusal(capsys, [*arguments, "--dtype", "fp16"], words)
    assert main(arguments) == 0


def test_nan_equals_nan_and_nothing_else(model: Path, tmp_path: Path) -> None:
    norm = tensors(model)["model.norm.weight"]
    norm[3] = torch.nan
    broken = changed(model, tmp_path / "broken", **{"model.norm.weight": norm})
    hf_to_megatron(broken, tmp_path / "m", grid=grid())
    assert all(compare(broken, tmp_path / "m").values())
    assert [name for name, same in compare(model, tmp_path / "m").items() if not same] == [
        "model.norm.weight"
    ]


def test_what_old_exporters_left_in_a_llama(
    models: dict[tuple[Family, bool], Path], tmp_path: Path
) -> None:
    """Rotary frequencies, which follow from config.json; and further chat templates."""
    names = [f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(4)]
    old = changed(
        models["llama", False], tmp_path / "old", **{name: torch.ones(16) for name in names}
    )
    (old / "additional_chat_templates").mkdir()
    (old / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages }}")
    hf_to_megatron(old, tmp_path / "m", grid=grid(tp=2))
    assert all(compare(old, tmp_path / "m").values())
    megatron_to_hf(tmp_path / "m", tmp_path / "h")
    assert tensors(tmp_path / "h").keys() == tensors(old).keys() - set(names)
    template = tmp_path / "h" / "additional_chat_templates" / "tool_use.jinja"
    assert template.read_text() == "{{ messages }}"


def test_shards_and_an_index_when_it_is_large(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(to_hf, "MAX_FILE_BYTES", 300_000)
    hf_to_megatron(model, tmp_path / "m", grid=grid())
    megatron_to_hf(tmp_path / "m", tmp_path / "h")
    index = json.loads((tmp_path / "h" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / "h" / file, framework="pt") as shard:
            assert name in set(shard.keys())
    # The sharded directory is itself a source.
    hf_to_megatron(tmp_path / "h", tmp_path / "m2", grid=grid())
    assert all(compare(model, tmp_path / "m2").values())


def test_a_difference_is_named(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hf_to_megatron(model, tmp_path / "m", grid=grid())
    other = tmp_path / "other"
    other.mkdir()
    for path in model.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    changed = tensors(model)
    changed["model.layers.2.mlp.up_proj.weight"][7, 3] += 1e-3
    save_file(changed, other / "model.safetensors", metadata={"format": "pt"})
    arguments = ["verify", "--hf", str(other), "--megatron", str(tmp_path / "m")]
    assert main([*arguments, "--no-logprobs"]) == 1
    printed = capsys.readouterr()
    assert "49 of 50 tensors are equal" in printed.out
    assert "first difference: model.layers.2.mlp.up_proj.weight" in printed.err


def test_the_command_line(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    m, h = str(tmp_path / "m"), str(tmp_path / "h")
    assert main(["hf-to-megatron", "--hf", str(model), "--megatron", m, "--tp", "2"]) == 0
    assert main(["megatron-to-hf", "--megatron", m, "--hf", h]) == 0
    out = capsys.readouterr().out
    assert out.count("50 tensors, 0.00 GB in") == 2
    # Log-probs too: in a process of its own, since Megatron's groups are global.
    command = [sys.executable, "-m", "checkpoint_convert", "verify", "--hf", h, "--megatron", m]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "50 of 50 tensors are equal" in done.stdout and "differ by at most" in done.stdout


def expect_refusal(capsys: pytest.CaptureFixture[str], arguments: list[str], *parts: str) -> None:
    """One line on stderr with all parts, exit code 2."""
    assert main(arguments) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error:")]
    for part in parts:
        assert part in line, line


def copy_of(source: Path, target: Path) -> Path:
    target.mkdir()
    for name in relative_files(source):
        (target / name).parent.mkdir(exist_ok=True)
        (target / name).write_bytes((source / name).read_bytes())
    return target


def test_bad_hugging_face_directories(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def to_megatron(hf: Path, *parts: str) -> None:
        target = tmp_path / "never"
        expect_refusal(
            capsys, ["hf-to-megatron", "--hf", str(hf), "--megatron", str(target)], *parts
        )
        assert not target.exists()

    to_megatron(tmp_path / "nothing", "no such directory")
    unknown = copy_of(model, tmp_path / "unknown")
    raw = json.loads((unknown / "config.json").read_text())
    (unknown / "config.json").write_text(json.dumps({**raw, "architectures": ["Gpt2Model"]}))
    to_megatron(unknown, "architecture Gpt2Model is not supported", "Qwen2ForCausalLM")
    cut = copy_of(model, tmp_path / "cut")
    os.truncate(cut / "model.safetensors", 100_000)
    to_megatron(cut, "model.safetensors")
    partial = copy_of(model, tmp_path / "partial")
    some = tensors(model)
    del some["model.layers.3.input_layernorm.weight"]
    save_file(some, partial / "model.safetensors")
    to_megatron(partial, "misses 1 tensors", "model.layers.3.input_layernorm.weight")
    (partial / "model.safetensors").unlink()
    index = {"weight_map": {name: "model-1.safetensors" for name in tensors(model)}}
    (partial / "model.safetensors.index.json").write_text(json.dumps(index))
    (partial / "x.safetensors").write_bytes(b"")
    to_megatron(partial, "model-1.safetensors")
    expect_refusal(
        capsys,
        ["hf-to-megatron", "--hf", str(model), "--megatron", str(tmp_path / "never"), "--tp", "3"],
        "does not divide the model's 4 attention heads",
    )


def test_bad_checkpoints(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf_to_megatron(model, tmp_path / "good", grid=grid(tp=2))

    def to_hf(megatron: Path, *parts: str) -> None:
        before = relative_files(megatron) if megatron.exists() else []
        target = tmp_path / "never"
        expect_refusal(
            capsys, ["megatron-to-hf", "--megatron", str(megatron), "--hf", str(target)], *parts
        )
        assert not target.exists()
        assert (relative_files(megatron) if megatron.exists() else []) == before

    to_hf(tmp_path / "nothing", "no such checkpoint")
    bad = copy_of(tmp_path / "good", tmp_path / "flipped")
    victim = bad / "__1_0.distcp"
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    to_hf(bad, "__1_0.distcp is damaged: its bytes are not those that were saved")
    os.truncate(victim, 1000)
    to_hf(bad, "__1_0.distcp is truncated or damaged: it has 1000 bytes")
    victim.unlink()
    to_hf(bad, "__1_0.distcp is missing")
    (bad / "complete.json").unlink()
    to_hf(bad, "has no complete.json")


def test_full_and_unwritable_places(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").write_text("mine")
    arguments = ["hf-to-megatron", "--hf", str(model), "--megatron"]
    expect_refusal(capsys, [*arguments, str(tmp_path / "taken")], "not an empty directory")
    expect_refusal(capsys, [*arguments, str(tmp_path / "taken" / "mine.txt" / "m")], "cannot write")
    assert (tmp_path / "taken" / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize("command", ["hf-to-megatron", "megatron-to-hf"])
def test_a_disk_that_fills_up(model: Path, tmp_path: Path, command: str) -> None:
    """The kernel refuses to let any file grow beyond 100 kB."""
    hf_to_megatron(model, tmp_path / "good", grid=grid())
    names = ("--megatron", "--hf") if command == "megatron-to-hf" else ("--hf", "--megatron")
    source = tmp_path / "good" if command == "megatron-to-hf" else model
    arguments = [command, names[0], str(source), names[1], str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-m", "checkpoint_convert", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
    )
    assert done.returncode == 2, done.stderr
    (line,) = [x for x in done.stderr.splitlines() if "error" in x]
    assert line.startswith(f"error: cannot write {tmp_path / 'out'}: File too large")
    assert list((tmp_path / "out").iterdir()) == []
