"""examples/gpg_in_one_file.py alone: what it knows, its parts by hand, and that it learns."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.one_file import PATH, example
from tests.tiny import make_answering_model, make_tiny_model, write_problems


def test_it_is_one_short_file_on_torch_and_transformers() -> None:
    text = PATH.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 200
    imported = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module or ".")
    libraries = {name.partition(".")[0] for name in imported} - set(sys.stdlib_module_names)
    assert libraries == {"torch", "transformers", "pyarrow"}


def test_advantages_by_hand() -> None:
    """Three groups, one of them dead: alpha is 3 / 2."""
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0], [0.0, 1.0, 1.0, 0.0]])
    advantages, alpha = example.advantages(rewards)
    assert alpha == 1.5
    assert advantages.tolist() == [
        [1.125, -0.375, -0.375, -0.375],
        [0.0, 0.0, 0.0, 0.0],
        [-0.75, 0.75, 0.75, -0.75],
    ]


def test_without_a_live_group_nothing_changes(tmp_path: Path) -> None:
    """Not even by what the optimizer remembers."""
    model = AutoModelForCausalLM.from_pretrained(make_tiny_model(tmp_path, num_layers=1))
    optimizer = example.make_optimizer(model, 1e-2)
    prompts, answers = [[5, 6]], [[[7], [8, 9]]]
    alive, _ = example.advantages(torch.tensor([[1.0, 0.0]]))
    assert example.update(model, optimizer, prompts, answers, alive) != 0.0
    before = [p.clone() for p in model.parameters()]
    dead, alpha = example.advantages(torch.tensor([[1.0, 1.0]]))
    assert (alpha, example.update(model, optimizer, prompts, answers, dead)) == (0.0, 0.0)
    assert all(map(torch.equal, model.parameters(), before))


def test_score_compares_the_text(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(make_tiny_model(tmp_path, num_layers=1))
    answers = [tokenizer.encode(text) for text in ("42", " 42\n", "4", "42.")]
    answers.append([*answers[0], tokenizer.eos_token_id])
    assert example.score(tokenizer, answers, "42") == [1.0, 1.0, 0.0, 0.0, 1.0]


def test_samples_are_drawn_from_the_model_itself(tmp_path: Path) -> None:
    """Whatever its directory says about sampling, and beside a longer prompt."""
    make_tiny_model(tmp_path, num_layers=1, sharpness=6.0)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    model.generation_config.update(do_sample=True, temperature=0.1, top_k=1, top_p=0.5)
    torch.manual_seed(1)
    prompts, n = [[5, 6], [7, 8, 9, 10]], 4000
    drawn = [
        torch.bincount(torch.tensor(group).flatten(), minlength=320) / n
        for group in example.sample(model, tokenizer, prompts, n, 1)
    ]
    with torch.no_grad():
        right = [model(torch.tensor([p])).logits[0, -1].softmax(-1) for p in prompts]
    for own, other, share in zip(right, reversed(right), drawn, strict=True):
        assert (share - own).abs().sum() < 0.1 < 0.5 < (share - other).abs().sum()


def test_an_answer_ends_with_its_end() -> None:
    assert example.until_end([3, 0, 4, 0], end=0) == [3, 0]
    assert example.until_end([3, 4], end=0) == [3, 4]


def test_the_command_learns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Which of 21 likely answers is the right one."""
    make_answering_model(tmp_path / "model")
    data = write_problems(tmp_path / "data.jsonl", ["a?", "b?", "c?", "d?"], answers=["#### 7"] * 4)
    options = "--steps 8 --prompts 4 --samples 32 --max-tokens 1 --lr 1e-3"
    example.main([f"--model={tmp_path / 'model'}", f"--data={data}", *options.split()])
    accuracy = [float(x) for x in re.findall(r"accuracy (\S+)", capsys.readouterr().out)]
    assert len(accuracy) == 8
    assert accuracy[0] < 0.2 and accuracy[-1] > 0.6
