"""The report page: complete, self-contained, escaped."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest

from gpg_megatron.errors import UserError
from gpg_megatron.observe.charts import N_COLORS, Kind, Panel, chart_svg
from gpg_megatron.observe.report import write_report

CONFIG = """\
model: {path: models/tiny}
policy: {tensor_model_parallel_size: 2, pipeline_model_parallel_size: 2, data_parallel_size: 1}
note: <b>&
"""
ROW = (
    '{{"step": {step}, "reward/accuracy": {accuracy}, "reward/mean": {accuracy}, '
    '"policy/loss": -0.1, "policy/grad_norm": null, "mismatch/logprob_max": 0.0, '
    '"timing/rollout_s": 2.0, "timing/policy_s": 1.0, "timing/step_s": 4.0}}\n'
)
SAMPLE = (
    '{{"step": {step}, "group": 0, "index": {index}, "prompt": "<script>alert(1)</script>", '
    '"response": "a & <img src=x>", "ground_truth": "7", "reward": {accuracy}, '
    '"accuracy": {accuracy}, "advantage": -0.5}}\n'
)


class Page(HTMLParser):
    """Counts the tags and checks that they nest."""

    VOID = ("meta", "br", "img", "input", "link", "use", "path")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: dict[str, int] = {}
        self.attributes: list[tuple[str, str | None]] = []
        self.text: list[str] = []
        self.ids: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] = self.tags.get(tag, 0) + 1
        self.attributes += attrs
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    directory = tmp_path / "my run"
    (directory / "rollouts").mkdir(parents=True)
    (directory / "config.yaml").write_text(CONFIG)
    rows = '{"step": 0, "eval/arith/mean@1": 0.31}\n'
    rows += "".join(ROW.format(step=s, accuracy=s / 10) for s in range(1, 10))
    (directory / "metrics.jsonl").write_text(rows + '{"step": 9, "eval/arith/mean@1": 0.961}\n')
    for step in (1, 9):
        samples = (SAMPLE.format(step=step, index=i, accuracy=float(i)) for i in range(2))
        (directory / "rollouts" / f"step_{step}.jsonl").write_text("".join(samples))
    return directory


def test_the_page_shows_the_run(run: Path) -> None:
    path = write_report(run)
    assert path == run / "report.html"
    assert sorted(p.name for p in run.iterdir()) == [
        "config.yaml",
        "metrics.jsonl",
        "report.html",
        "rollouts",
    ]
    page = Page(path.read_text(encoding="utf-8"))
    text = " ".join(" ".join(page.text).split())
    for piece in ("my run", "tiny · TP 2 × PP 2 × DP 1 · 9 steps", "0.961", "arith, from 0.310",
                  "0.900 training accuracy from 0.100", "36 s in steps 4.0 s a step",
                  "Accuracy", "Loss and gradient norm", "Log-prob mismatch",
                  "Time by phase", "✓ right", "✗ wrong", "note: <b>&"):  # fmt: skip
        assert piece in text, piece
    # Keys that the run did not log make no chart: alpha, throughput.
    assert page.tags["svg"] == 4
    assert "Throughput" not in text and "training reward" not in text


def test_the_page_needs_nothing_from_outside_and_escapes_what_the_model_says(run: Path) -> None:
    text = write_report(run).read_text(encoding="utf-8")
    page = Page(text)
    assert {"script", "img", "link", "iframe"}.isdisjoint(page.tags)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    addresses = [value or "" for name, value in page.attributes if name.endswith(("href", "src"))]
    assert addresses and all(address.startswith("#") for address in addresses)
    assert "@import" not in text and "url(http" not in text


def test_no_two_elements_share_an_id(run: Path) -> None:
    page = Page(write_report(run).read_text(encoding="utf-8"))
    assert page.ids and len(page.ids) == len(set(page.ids))


def test_the_page_is_the_same_every_time(run: Path) -> None:
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first


def test_a_run_of_one_step_without_config_and_samples(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "policy/loss": null, "x": 1.0}\n')
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert "svg" not in page.tags
    assert any("No completions" in text for text in page.text)


def test_the_page_names_damaged_lines(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n\0\n{"step": 2, "policy/loss": 1.0}\n')
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert any("2 steps" in x and "damaged and left out: line 2" in x for x in page.text)


def test_a_directory_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist; expected the output_dir of a run"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["line", "log", "stack"])
@pytest.mark.parametrize("n", [1, 3, 200])
def test_charts_take_their_colours_from_the_page(kind: Kind, n: int) -> None:
    values = [0.0 if i == 0 else math.nan if i == 1 else 10.0**-i for i in range(n)]
    names = [f"series {i}" for i in range(N_COLORS)]
    svg = chart_svg(
        range(n), [Panel(label="unit <1>", series=dict.fromkeys(names, values), kind=kind)], "c"
    )
    texts = [element.text for element in ET.fromstring(svg).iter() if element.text]
    assert {*names, "unit <1>", "step"} <= {text.strip() for text in texts}
    for i in range(N_COLORS):
        assert f"var(--c{i})" in svg
    assert "currentColor" in svg and "#0101" not in svg
