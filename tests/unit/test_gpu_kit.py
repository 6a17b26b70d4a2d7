"""The kit for GPUs: what it makes of rows that end well, fail, die, hang or cannot run."""

from __future__ import annotations

import json
import re
import secrets
import time
from pathlib import Path

import psutil
import pytest

from tests.gpu import kit
from tests.gpu.kit_process import Outcome, Row, run_row
from tests.gpu.kit_table import ROWS
from tests.gpu.machine import Machine, Need, missing

ROOT = Path(__file__).resolve().parents[2]
ROW_LIMIT_S, TOTAL_LIMIT_S = 480.0, 1200.0
CPU = Machine(device="cpu", name="2 CPU cores", gpus=0, versions="Python 3.12", has_vllm=False)
GPU = Machine(device="cuda", name="H100", gpus=1, versions="Python 3.12", has_vllm=False)
TWO = Machine(device="cuda", name="2 x H100", gpus=2, versions="Python 3.12", has_vllm=True)


def row(name: str, needs: tuple[Need, ...] = (), limit_s: float = 60.0) -> Row:
    return Row(
        name=name,
        what=f"what {name} shows",
        function=f"tests.unit.kit_rows:{name}",
        needs=needs,
        limit_s=limit_s,
    )


def test_what_a_row_has_seen_stands_in_one_line() -> None:
    outcome = run_row(row("fine"), CPU, left_s=60.0)
    assert (outcome.state, outcome.seen) == ("ran", "on cpu, in work / 0 files")
    assert outcome.seconds > 0.0 and outcome.log == ()


def test_a_row_that_raises_says_so_in_one_line_and_keeps_its_log() -> None:
    outcome = run_row(row("fails"), CPU, left_s=60.0)
    assert (outcome.state, outcome.seen) == ("failed", "ValueError: the last line")
    assert outcome.log[0] == "before" and outcome.log[-1] == "and one more"


def test_a_row_that_dies_has_the_signal_and_its_last_line() -> None:
    outcome = run_row(row("dies"), CPU, left_s=60.0)
    assert outcome.state == "failed"
    assert outcome.seen == "SIGSEGV; last line: the last that it said"


def test_a_row_that_is_not_there_fails() -> None:
    outcome = run_row(row("nothing"), CPU, left_s=60.0)
    assert outcome.state == "failed" and outcome.seen.startswith("AttributeError: ")


@pytest.mark.parametrize("left_s", [2.0, 60.0], ids=["of all rows", "of its own"])
def test_a_row_that_hangs_costs_its_limit_and_leaves_nothing(
    left_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = secrets.token_hex(8)
    monkeypatch.setenv("GPG_KIT_TEST", mark)
    begin = time.monotonic()
    outcome = run_row(row("hangs", limit_s=62.0 - left_s), CPU, left_s=left_s)
    assert outcome.state == "failed"
    assert outcome.seen == f"no end within 2 s; last line: child of {mark}"
    assert time.monotonic() - begin < 30.0
    assert not [p for p in psutil.process_iter(["cmdline"]) if mark in (p.info["cmdline"] or ())]


@pytest.mark.parametrize(
    ("need", "machine", "why"),
    [
        ("a GPU", CPU, "needs a GPU"),
        ("a GPU", GPU, None),
        ("two GPUs", CPU, None),  # two processes share the CPU
        ("two GPUs", GPU, "needs two GPUs"),
        ("two GPUs", TWO, None),
        ("vLLM", GPU, "needs vLLM"),
        ("vLLM", TWO, None),
    ],
)
def test_what_a_machine_lacks(need: Need, machine: Machine, why: str | None) -> None:
    assert missing(need, machine) == why


def test_a_row_that_is_not_possible_is_not_started() -> None:
    outcome = run_row(row("hangs", needs=("a GPU", "vLLM")), CPU, left_s=60.0)
    assert outcome == Outcome(state="not possible here", seen="needs a GPU; needs vLLM")


def test_no_row_starts_when_the_time_of_all_is_over() -> None:
    outcome = run_row(row("hangs"), CPU, left_s=-1.0)
    assert outcome.state == "not possible here"
    assert outcome.seen == "no time is left; --rows hangs runs it alone"


def test_a_new_result_replaces_that_of_its_row_and_machine_only() -> None:
    a, b = ({"row": x, "machine": "H100", "seen": "old"} for x in "ab")
    other = {"row": "a", "machine": "H200", "seen": "old"}
    new = {"row": "a", "machine": "H100", "seen": "new"}
    assert kit.merged([a, b, other], new) == [b, other, new]


def test_the_kit_runs_its_rows_adds_to_the_file_and_prints_what_to_paste(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kit, "ask_machine", lambda device: {"cpu": CPU}[device])
    out = tmp_path / "out.json"
    kept = {"row": "fine", "machine": "H100", "seen": "elsewhere"}
    out.write_text(json.dumps({"rows": [kept]}))
    rows = (row("fails"), row("fine"), row("hangs", needs=("a GPU",)))
    arguments = ["--device", "cpu", "--json", str(out)]
    assert kit.main([*arguments, "--rows", "fine", "hangs"], rows) == 0
    printed = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"\| `fine` \| ran: on cpu, in work / 0 files \| \d+ \|", printed[-2])
    assert printed[-1] == "| `hangs` | not possible here: needs a GPU | 0 |"
    assert kit.main([*arguments, "--rows", "fails"], rows) == 1
    assert "    ValueError: the last line" in capsys.readouterr().out.splitlines()
    found = json.loads(out.read_text())["rows"]
    assert found[0] == kept
    assert [(x["row"], x["state"], x["machine"]) for x in found[1:]] == [
        ("fine", "ran", CPU.name),
        ("hangs", "not possible here", CPU.name),
        ("fails", "failed", CPU.name),
    ]
    assert found[-1]["command"] == "python -m tests.gpu.kit --rows fails --device cpu"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"rows": [{"row": "a"}]}', '{"rows": [1]}'])
def test_a_file_that_is_not_the_kits_is_refused_before_anything_runs(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    out.write_text(text)
    assert kit.main(["--json", str(out)], (row("hangs"),)) == 2
    assert capsys.readouterr().err == (
        f"kit: --json {out}: not a file of the kit; expected one, or none\n"
    )
    assert out.read_text() == text


def test_an_unknown_row_is_refused_with_the_names_of_all(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit, match="2"):
        kit.main(["--rows", "devices"])
    assert "'devices'" in (told := capsys.readouterr().err) and "device" in told


def test_every_row_has_a_function_a_name_of_its_own_and_a_limit() -> None:
    assert len({x.name for x in ROWS}) == len(ROWS)
    assert kit.TOTAL_LIMIT_S < TOTAL_LIMIT_S
    for x in ROWS:
        assert 0.0 < x.limit_s < ROW_LIMIT_S
        module, _, function = x.function.partition(":")
        source = (ROOT / module.replace(".", "/")).with_suffix(".py").read_text(encoding="utf-8")
        assert re.search(rf"^def {function}\(device: Device, folder: Path\) -> str:", source, re.M)


def test_the_status_page_has_every_row_with_its_command() -> None:
    text = (ROOT / "docs" / "gpu-status.md").read_text(encoding="utf-8")
    names = re.findall(r"^\| `([\w-]+)` \|", text, re.MULTILINE)
    assert set(names) == {x.name for x in ROWS}
    for x in ROWS:
        assert re.search(rf"^\| `{x.name}` \| {re.escape(x.what)} \|", text, re.MULTILINE), x.name


@pytest.mark.slow
@pytest.mark.timeout(TOTAL_LIMIT_S)
def test_every_row_with_a_cpu_meaning_runs(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    assert kit.main(["--device", "cpu", "--json", str(out)]) == 0
    found = {x["row"]: x for x in json.loads(out.read_text())["rows"]}
    for x in ROWS:
        possible = not [need for need in x.needs if need != "two GPUs"]
        assert found[x.name]["state"] == ("ran" if possible else "not possible here"), x.name
