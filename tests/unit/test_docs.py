"""The pages in docs/: the configuration tables against the dataclasses, and the links."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from gpg_megatron.config.sections import Config

ROOT = Path(__file__).resolve().parents[2]
PAGES = [*sorted((ROOT / "docs").glob("*.md")), *filter(Path.exists, [ROOT / "README.md"])]
SECTIONS = [section.name for section in dataclasses.fields(Config)]

_HEADING = re.compile(r"#+ (?P<title>.+)")
_ROW = re.compile(r"\| `(?P<key>\w+)` \| `(?P<default>[^`]*)` \| [^|]+ \| [^|]+ \|")
_FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"`[^`\n]*`")
_LINK = re.compile(r"\]\((?P<target>[^)\s]+)\)")


def documented_defaults(section: str) -> dict[str, str]:
    """Key -> default as docs/configuration.md spells it, from the table under the heading."""
    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    defaults: dict[str, str] = {}
    title = ""
    for line in text.splitlines():
        if heading := _HEADING.fullmatch(line):
            title = heading["title"]
        elif title == section and line.startswith("| `"):
            row = _ROW.fullmatch(line)
            assert row is not None, f"not a row of key, default, meaning, legal: {line}"
            assert row["key"] not in defaults, f"{section}.{row['key']} appears twice"
            defaults[row["key"]] = row["default"]
    return defaults


@pytest.mark.parametrize("section", SECTIONS)
def test_the_configuration_page_has_every_key_with_its_default(section: str) -> None:
    expected = dataclasses.asdict(getattr(Config(), section))
    documented = documented_defaults(section)
    assert documented.keys() == expected.keys()
    for key, default in expected.items():
        value = yaml.safe_load(documented[key])
        if isinstance(default, float):
            value = float(value)  # YAML 1.1 takes 1e-6 for a text
        elif isinstance(default, tuple):
            value = tuple(value)
        assert (value, type(value)) == (default, type(default)), f"{section}.{key}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_lead_to_files(page: Path) -> None:
    text = _CODE.sub("", _FENCED.sub("", page.read_text(encoding="utf-8")))
    targets = [link["target"].partition("#")[0] for link in _LINK.finditer(text)]
    relative = [target for target in targets if target and "://" not in target]
    missing = [target for target in relative if not (page.parent / target).exists()]
    assert not missing
