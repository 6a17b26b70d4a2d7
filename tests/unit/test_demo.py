"""The demo model: tokenizer, slips, and a directory that is made once or not at all."""

from __future__ import annotations

import json
import random
from pathlib import Path
from unicodedata import normalize

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from gpg_megatron.data import arithmetic
from gpg_megatron.data.schema import read_problems
from gpg_megatron.demo import model as demo_model
from gpg_megatron.demo.make import MARKER, main, make_demo
from gpg_megatron.demo.settings import TASK, DemoSettings
from gpg_megatron.errors import UserError

SMALL = DemoSettings(warmup_steps=4, batch_size=8, train_rows=16, test_rows=8)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "made"
    assert make_demo(out, SMALL)
    return out


@pytest.fixture(scope="module")
def tokenizer(made: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(made / "model")


@given(text=st.text())
def test_any_text_survives_the_tokenizer(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == normalize(
        "NFC", text
    )


def test_the_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("497")) == ["4", "9", "7"]
    special = (tokenizer.pad_token, tokenizer.bos_token, tokenizer.eos_token)
    assert special == (demo_model.PAD, demo_model.BOS, demo_model.EOS)
    assert len(tokenizer) % 64 != 0
    chat = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "U"},
        {"role": "assistant", "content": "A"},
    ]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == (
        "<|begin|><|system|>S<|user|>U<|assistant|>A<|end|>"
    )


def test_the_model_directory_splits_over_two_by_two(
    made: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    config = AutoConfig.from_pretrained(made / "model")
    assert config.hidden_size // config.num_attention_heads == 32
    assert config.num_attention_heads % 2 == config.num_key_value_heads % 2 == 0
    assert config.num_hidden_layers % 2 == 0
    assert config.tie_word_embeddings
    assert config.vocab_size == len(tokenizer)
    model = AutoModelForCausalLM.from_pretrained(made / "model")
    assert 1_000_000 <= model.num_parameters() <= 3_000_000
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


def test_the_warm_up_never_sees_a_held_out_problem(made: Path) -> None:
    train = read_problems(made / "train.parquet")
    test = read_problems(made / "test.parquet")
    assert (len(train), len(test)) == (16, 8)
    split = arithmetic.draw(TASK, seed=1, train_size=32, test_size=8)
    assert [p.messages[0]["content"] for p in test] == [
        arithmetic.TASKS[TASK].question(x) for x in split.test
    ]
    assert {p.data_source for p in train + test} == {"arithmetic/largest"}


def test_it_is_made_once_and_only_with_the_same_settings(made: Path) -> None:
    before = (made / "model" / "model.safetensors").stat().st_mtime_ns
    assert not make_demo(made, SMALL)
    assert (made / "model" / "model.safetensors").stat().st_mtime_ns == before
    other = DemoSettings(**{**json.loads((made / MARKER).read_text())["settings"], "seed": 2})
    with pytest.raises(UserError, match=r"other settings \(seed 1\)"):
        make_demo(made, other)
    assert [p.name for p in made.parent.iterdir()] == ["made"]


def test_a_folder_of_something_else_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    assert main(["--out", str(tmp_path)]) == 2
    assert "holds no demo" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_the_same_seed_gives_the_same_weights(made: Path, tmp_path: Path) -> None:
    torch.manual_seed(99)
    make_demo(tmp_path / "again", SMALL)
    name = "model/model.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (made / name).read_bytes()


@given(operands=st.permutations(range(10, 100)).map(lambda x: tuple(x[:3])), seed=st.integers())
def test_a_slip_is_wrong_and_has_two_digits(operands: tuple[int, int, int], seed: int) -> None:
    value = demo_model.slip(operands, random.Random(seed))
    assert value != max(operands)
    assert 10 <= value <= 99
    near = abs(value - max(operands)) in (1, 10)
    assert near or value in operands


def test_log_probs_and_pass_rate_are_those_of_generation(
    made: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = AutoModelForCausalLM.from_pretrained(made / "model").eval()
    problem = (20, 97, 31)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": arithmetic.TASKS[TASK].question(problem)}],
        add_generation_prompt=True,
        return_dict=False,
    )
    total = 0.0
    with torch.no_grad():
        for token in (*tokenizer.encode("97"), tokenizer.eos_token_id):
            total += model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)[token].item()
            ids = [*ids, token]
    rate = demo_model.pass_rate(model, tokenizer, [problem])
    assert rate == pytest.approx(torch.tensor(total).exp().item(), rel=1e-4)
