"""FILE.py:NAME."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpg_megatron.errors import UserError
from gpg_megatron.plugins import load_object


def test_an_object_of_a_file_with_a_neighbour(tmp_path: Path) -> None:
    (tmp_path / "neighbour_of_plugin.py").write_text("VALUE = 41\n")
    file = tmp_path / "plugin.py"
    file.write_text("from neighbour_of_plugin import VALUE\ndef f():\n    return VALUE + 1\n")
    assert load_object(f"{file}:f", "k")() == 42


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("plugin.py", "expected FILE.py:NAME"),
        ("plugin.txt:f", "expected FILE.py:NAME"),
        ("plugin.py:1f", "expected FILE.py:NAME"),
        ("nowhere.py:f", "no such file: nowhere.py"),
        ("good.py:g", "good.py has no g"),
        ("broken.py:f", "broken.py: ZeroDivisionError: division by zero"),
    ],
)
def test_mistakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good.py").write_text("f = 1\n")
    (tmp_path / "broken.py").write_text("f = 1 / 0\n")
    with pytest.raises(UserError, match=r"^the\.key") as caught:
        load_object(spec, "the.key")
    assert message in str(caught.value)
