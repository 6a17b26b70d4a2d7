"""The pages in docs/: the configuration tables against the dataclasses, and the links."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from gpg_megatron.config.ranges import ranges
from gpg_megatron.config.sections import Config
from tests.import_graph import file_graph, picture, room_graph

ROOT = Path(__file__).resolve().parents[2]
PAGES = [*sorted((ROOT / "docs").glob("*.md")), *filter(Path.exists, [ROOT / "README.md"])]
SECTIONS = [section.name for section in dataclasses.fields(Config)]

_HEADING = re.compile(r"#+ (?P<title>.+)")
_ROW = re.compile(r"\| `(?P<key>\w+)` \| `(?P<default>[^`]*)` \| [^|]+ \| (?P<legal>[^|]+) \|")
_FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"`[^`\n]*`")
_LINK = re.compile(r"\]\((?P<target>[^)\s]+)\)")


def documented(section: str) -> dict[str, dict[str, str]]:
    """Key -> its row in docs/configuration.md, from the table under the heading."""
    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    rows: dict[str, dict[str, str]] = {}
    title = ""
    for line in text.splitlines():
        if heading := _HEADING.fullmatch(line):
            title = heading["title"]
        elif title == section and line.startswith("| `"):
            row = _ROW.fullmatch(line)
            assert row is not None, f"not a row of key, default, meaning, legal: {line}"
            assert row["key"] not in rows, f"{section}.{row['key']} appears twice"
            rows[row["key"]] = row.groupdict()
    return rows


@pytest.mark.parametrize("section", SECTIONS)
def test_the_configuration_page_has_every_key_with_its_default(section: str) -> None:
    expected = dataclasses.asdict(getattr(Config(), section))
    rows = documented(section)
    assert rows.keys() == expected.keys()
    for key, default in expected.items():
        value = yaml.safe_load(rows[key]["default"])
        if isinstance(default, float):
            value = float(value)  # YAML 1.1 takes 1e-6 for a text
        elif isinstance(default, tuple):
            value = tuple(value)
        assert (value, type(value)) == (default, type(default)), f"{section}.{key}"


@pytest.mark.parametrize(("key", "allowed"), [(key, str(x)) for key, x, _ in ranges(Config())])
def test_the_configuration_page_begins_with_the_range_of_a_number(key: str, allowed: str) -> None:
    section, _, name = key.partition(".")
    legal = documented(section)[name]["legal"]
    assert re.match(rf"{re.escape(allowed)}($|[,;:] )", legal), f"{legal}; expected {allowed}"


def test_the_picture_of_the_rooms_is_that_of_the_code() -> None:
    drawn = "\n".join(picture(room_graph(file_graph())))
    assert drawn in (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_lead_to_files(page: Path) -> None:
    text = _CODE.sub("", _FENCED.sub("", page.read_text(encoding="utf-8")))
    targets = [link["target"].partition("#")[0] for link in _LINK.finditer(text)]
    relative = [target for target in targets if target and "://" not in target]
    missing = [target for target in relative if not (page.parent / target).exists()]
    assert not missing
