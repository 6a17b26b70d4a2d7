"""The pool with scorers that really hang, really exit and really raise."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from gpg_megatron.config.reward import RewardConfig
from gpg_megatron.errors import RunError, UserError
from gpg_megatron.reward import pool as pool_module
from gpg_megatron.reward.pool import RewardPool
from gpg_megatron.types import Completion, Prompt, Reward, VersionSpan
from tests.samples import float32, int32

ROOT = Path(__file__).resolve().parents[2]

# Each response names what its scorer does.
BAD_SCORERS = """
import os, re, time

def act(response, ground_truth):
    if response == "sleep":
        time.sleep(600)
    if response == "regex":
        re.match(r"(a+)+$", "a" * 60 + "b")
    if response == "exit":
        os._exit(3)
    if response == "raise":
        raise ZeroDivisionError("a bug in a scorer")
    if response == "slow":
        time.sleep(0.3)
    if response == "print":
        print("a scorer that talks")
    if response == "memory":
        bytearray(2**40)
    if response == "deep":
        return act("deep", ground_truth)
    right = float(response == ground_truth)
    return right, right, {"act": right}, response

SCORERS = {"exact_match": act}
"""
HANG = {"timeout": 1.0}
CRASH = {"crash": 1.0}


@pytest.fixture
def bad_scorers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "bad_scorers.py").write_text(BAD_SCORERS)
    monkeypatch.syspath_prepend(tmp_path)
    return "bad_scorers"


def item(
    responses: Sequence[str],
    truth: str = "yes",
    source: str = "arithmetic",
    lengths: Sequence[int] = (),
) -> tuple[Prompt, list[Completion]]:
    prompt = Prompt(
        id=f"{source}/0", token_ids=int32((1,)), messages=(), ground_truth=truth, data_source=source
    )
    completions = [
        Completion(
            prompt_id=prompt.id,
            index=i,
            token_ids=int32((5,) * n),
            logprobs=float32((-0.5,) * n),
            finish_reason="stop",
            text=text,
            versions=(VersionSpan(version=0, start=0, end=n),),
        )
        for i, (text, n) in enumerate(zip(responses, lengths or [1] * len(responses), strict=True))
    ]
    return prompt, completions


def children() -> list[psutil.Process]:
    return [p for p in psutil.Process().children() if "reward.worker" in " ".join(p.cmdline())]


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s} s for {what}"
        time.sleep(0.02)


def test_groups_come_back_in_order() -> None:
    items = [
        item(["4", "5", " 4 "], truth="4"),
        item(["#### 1,000", "1000"], truth="1000", source="gsm8k"),
        item([], truth="1"),
        item(["x"] * 150 + ["y"], truth="y"),
    ]
    with closing(RewardPool(RewardConfig(num_workers=2))) as pool:
        for _ in range(2):
            groups = pool.score(items)
            assert [group.prompt for group in groups] == [prompt for prompt, _ in items]
            assert [list(group.completions) for group in groups] == [c for _, c in items]
            scores = [[reward.score for reward in group.rewards] for group in groups]
            assert scores == [[1.0, 0.0, 1.0], [1.0, 0.0], [], [0.0] * 150 + [1.0]]
        assert groups[1].rewards[1].parts == {"gsm8k": 0.0, "format": 0.0}
        assert pool.score([]) == []


def test_the_tolerance_reaches_the_scorers_of_mathematics() -> None:
    responses = ["\\boxed{1.1} #### 1.1", "\\boxed{1.11} #### 1.11", "\\boxed{0.9} #### 0.9"]
    names = ["math", "math_verify", "gsm8k", "verl_math"]
    config = RewardConfig(tolerance=0.1, by_source={name: name for name in names})
    with closing(RewardPool(config)) as pool:
        groups = pool.score([item(responses, "1", name) for name in names])
    # A tenth is a tenth, though no float is.
    found = [[reward.accuracy for reward in group.rewards] for group in groups]
    assert found == [[1.0, 0.0, 1.0], [1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]


@pytest.mark.parametrize("hang", ["sleep", "regex"])
def test_an_answer_that_hangs_costs_itself_only(bad_scorers: str, hang: str) -> None:
    config = RewardConfig(timeout_s=0.5)
    with closing(RewardPool(config, scorers_module=bad_scorers)) as pool:
        before = children()
        start = time.monotonic()
        [group] = pool.score([item(["yes", hang, "yes", "no"])])
        assert time.monotonic() - start < 10
        assert [reward.score for reward in group.rewards] == [1.0, 0.0, 1.0, 0.0]
        assert group.rewards[1].parts == HANG and group.rewards[1].accuracy == 0.0
        assert group.rewards[3].parts == {"act": 0.0}
        assert before != children() and len(children()) == 1


@pytest.mark.parametrize("crash", ["exit", "raise"])
def test_an_answer_that_crashes_costs_itself_only(bad_scorers: str, crash: str) -> None:
    responses = ["yes", crash, "yes", crash, "no"]
    with closing(RewardPool(RewardConfig(num_workers=2), scorers_module=bad_scorers)) as pool:
        [group] = pool.score([item(responses)])
        assert [reward.score for reward in group.rewards] == [1.0, 0.0, 1.0, 0.0, 0.0]
        assert [reward.parts == CRASH for reward in group.rewards] == [
            text == crash for text in responses
        ]


def test_running_out_of_memory_costs_the_answer_only(
    bad_scorers: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And it is no crash: a scorer is not broken because answers are too large for it."""
    monkeypatch.setattr(pool_module, "MAX_CRASHES_IN_A_ROW", 2)
    config = RewardConfig(timeout_score=-1.0)
    with closing(RewardPool(config, scorers_module=bad_scorers)) as pool:
        [group] = pool.score([item(["yes", "memory", "memory", "memory", "no"])])
        assert [reward.score for reward in group.rewards] == [1.0, -1.0, -1.0, -1.0, 0.0]
        assert [reward.accuracy for reward in group.rewards] == [1.0, 0.0, 0.0, 0.0, 0.0]
        assert group.rewards[1].parts == {"memory": 1.0}


def test_too_deep_a_recursion_costs_no_process(bad_scorers: str) -> None:
    with closing(RewardPool(RewardConfig(), scorers_module=bad_scorers)) as pool:
        before = children()
        [group] = pool.score([item(["deep", "yes"])])
        assert [r.score for r in group.rewards] == [0.0, 1.0]
        assert group.rewards[0].parts == {"too_deep": 1.0}
        assert children() == before


def test_answers_for_votes_come_back_and_are_cut(bad_scorers: str) -> None:
    with closing(RewardPool(RewardConfig(), scorers_module=bad_scorers)) as pool:
        [group] = pool.score([item(["yes", "x" * 10**6])])
    assert [r.answer for r in group.rewards] == ["yes", "x" * 200]


def test_a_score_of_parts() -> None:
    """format 0.25 x found, overlong 2 x DAPO's part, length 1 x Kimi's part."""
    config = RewardConfig(
        weights={"answer": 1.0, "format": 0.25, "overlong": 2.0, "length": 1.0}, overlong_buffer=4
    )
    texts = ["#### 5", "#### 6", "5", "#### 5"]
    with closing(RewardPool(config, max_response_length=10)) as pool:
        [group] = pool.score([item(texts, "5", "gsm8k", lengths=[2, 4, 8, 10])])
    answer, form, overlong = [1, 0, 0, 1], [1, 1, 0, 1], [0, 0, -0.5, -1]
    length = [0.5, 0.0, -0.25, -0.5]  # 0.5 - (n - 2) / 8; the second is wrong and gets no 0.25
    expected = [
        a + 0.25 * f + 2 * o + x for a, f, o, x in zip(answer, form, overlong, length, strict=True)
    ]
    assert [r.score for r in group.rewards] == pytest.approx(expected)
    assert [r.accuracy for r in group.rewards] == answer
    assert group.rewards[2].parts == {
        "gsm8k": 0.0, "answer": 0.0, "format": 0.0, "overlong": -0.5, "length": -0.25,
    }  # fmt: skip


def test_a_pattern_decides_about_the_format() -> None:
    config = RewardConfig(
        weights={"answer": 1.0, "format": 0.5}, format_pattern=r"(?s)^<think>.*</think>"
    )
    with closing(RewardPool(config)) as pool:
        [group] = pool.score([item(["<think>\n</think>#### 5", "#### 5"], "5", "gsm8k")])
    assert [r.score for r in group.rewards] == [1.5, 1.0]


def test_an_answer_without_a_verdict_gets_no_parts(bad_scorers: str) -> None:
    config = RewardConfig(weights={"answer": 1.0, "length": 1.0}, timeout_score=-2.0)
    with closing(RewardPool(config, scorers_module=bad_scorers)) as pool:
        [group] = pool.score([item(["exit", "yes"], lengths=[1, 3])])
    assert [r.score for r in group.rewards] == [-2.0, 0.5]
    assert group.rewards[0].parts == CRASH


def test_the_time_limit_is_for_one_answer_not_for_a_chunk(bad_scorers: str) -> None:
    config = RewardConfig(timeout_s=0.8)
    with closing(RewardPool(config, scorers_module=bad_scorers)) as pool:
        [group] = pool.score([item(["slow"] * 4 + ["yes"] * 28)])
        assert not any(reward.parts == HANG for reward in group.rewards)
        assert sum(reward.score for reward in group.rewards) == 28


def test_a_worker_that_dies_between_batches_costs_nothing() -> None:
    with closing(RewardPool(RewardConfig())) as pool:
        [child] = children()
        child.kill()
        child.wait(timeout=10)
        [group] = pool.score([item(["yes", "no"])])
        assert [reward.score for reward in group.rewards] == [1.0, 0.0]


def test_a_scorer_that_always_crashes_is_reported(
    bad_scorers: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_module, "MAX_CRASHES_IN_A_ROW", 3)
    with closing(RewardPool(RewardConfig(), scorers_module=bad_scorers)) as pool:
        [group] = pool.score([item(["exit", "exit", "yes", "exit", "exit", "yes"])])
        assert sum(reward.score for reward in group.rewards) == 2
        with pytest.raises(RunError, match="3 answers in a row: .*: its process ended with code 3"):
            pool.score([item(["exit"] * 5)])
    assert children() == []


def test_a_scorer_that_always_raises_is_quoted(
    bad_scorers: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pool_module, "MAX_CRASHES_IN_A_ROW", 3)
    said = r"exact_match: ZeroDivisionError: a bug in a scorer \(.*bad_scorers.py:12\)"
    with closing(RewardPool(RewardConfig(), scorers_module=bad_scorers)) as pool:
        before = children()
        pool.score([item(["raise", "yes", "raise"])])
        assert children() == before
        (line,) = capfd.readouterr().err.splitlines()
        assert re.fullmatch(f"warning: a scorer failed, its answer scores 0: {said}", line)
        with pytest.raises(RunError, match=f"3 answers in a row: {said}"):
            pool.score([item(["raise"] * 5)])
    assert capfd.readouterr().err == "" and children() == []


def test_a_scorer_module_that_cannot_be_imported(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="exit code 1 while it started"):
        RewardPool(RewardConfig(), scorers_module="no_such_module_of_scorers")
    assert children() == []


def test_an_unknown_data_source_is_the_users_mistake() -> None:
    with closing(RewardPool(RewardConfig())) as pool:
        with pytest.raises(UserError, match="'unheard-of'"):
            pool.score([item(["yes"], source="unheard-of")])
        [group] = pool.score([item(["yes"])])
        assert group.rewards[0].score == 1.0


def test_what_a_scorer_prints_goes_to_stderr(
    bad_scorers: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with closing(RewardPool(RewardConfig(), scorers_module=bad_scorers)) as pool:
        pool.score([item(["print", "yes"])])
    out, err = capfd.readouterr()
    assert out == "" and "a scorer that talks" in err


def test_close_leaves_no_process() -> None:
    pool = RewardPool(RewardConfig(num_workers=2))
    assert len(children()) == 2
    pool.close()
    pool.close()
    assert children() == []


def test_the_worker_imports_nothing_heavy() -> None:
    code = (
        "import sys, gpg_megatron.reward.worker, gpg_megatron.reward.scorers; print(*sys.modules)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert run.returncode == 0, run.stderr
    heavy = {
        "sympy",
        "math_verify",
        "torch",
        "ray",
        "numpy",
        "omegaconf",
        "vllm",
        "megatron",
        "transformers",
    }
    assert heavy.isdisjoint(run.stdout.split())


def test_no_orphan_when_the_parent_is_killed(tmp_path: Path) -> None:
    """One process waits for work, one is inside a C call that holds the interpreter lock."""
    (tmp_path / "bad_scorers.py").write_text(BAD_SCORERS)
    script = tmp_path / "parent.py"
    script.write_text(
        "import sys\n"
        f"sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}, {str(Path(__file__).parent)!r}]\n"
        "from gpg_megatron.config.reward import RewardConfig\n"
        "from gpg_megatron.reward.pool import RewardPool\n"
        "from test_reward_pool import item\n"
        "config = RewardConfig(num_workers=2, timeout_s=600)\n"
        "pool = RewardPool(config, scorers_module='bad_scorers')\n"
        "pool.score([item(['yes', 'no'])])\n"
        "print('scored', flush=True)\n"
        "pool.score([item(['regex'])])\n"
    )
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    try:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "scored\n"
        workers = psutil.Process(parent.pid).children()
        assert len(workers) == 2

        def cpu_seconds() -> list[float]:
            return sorted(worker.cpu_times().user for worker in workers)

        idle, _ = cpu_seconds()
        wait_until(lambda: cpu_seconds()[1] > idle + 0.5, "the regular expression to run")
        parent.kill()
        parent.wait(timeout=10)
        gone, _ = psutil.wait_procs(workers, timeout=5)
        assert len(gone) == 2
    finally:
        parent.kill()
        parent.wait(timeout=10)
        if parent.stdout is not None:
            parent.stdout.close()


def test_thousands_of_answers_a_second_and_core() -> None:
    text = "She has 3 + 4 = 7 apples and eats 2 of them. " * 20
    items = [item([f"{text}\n#### {n}" for n in range(8)], "5", "gsm8k") for _ in range(500)]
    with closing(RewardPool(RewardConfig())) as pool:
        [child] = children()

        def cpu_seconds() -> float:
            """Of both sides: unlike the time on the clock, other programs do not change it."""
            times = child.cpu_times()
            return float(time.process_time() + times.user + times.system)

        start = cpu_seconds()
        groups = pool.score(items)
        seconds = cpu_seconds() - start
    assert all([r.score for r in g.rewards] == [0, 0, 0, 0, 0, 1, 0, 0] for g in groups)
    assert 4000 / seconds > 2000, f"{4000 / seconds:.0f} answers per CPU second"


CUSTOM = """
import fractions, math
import numpy

def number(data_source, solution_str, ground_truth, extra_info=None):
    return solution_str == ground_truth and data_source == "riddles"

def verl_style(data_source, solution_str, ground_truth, extra_info=None):
    return {
        "score": numpy.float32(0.5), "acc": numpy.bool_(True), "pred": solution_str[:1],
        "style": numpy.int64(2), "timeout": fractions.Fraction(1), "format": 0.25, "note": "text",
    }

def extra(data_source, solution_str, ground_truth, extra_info=None):
    return float(extra_info["index"] == 7 and extra_info.get("nothing") is None)

def wrong(data_source, solution_str, ground_truth, extra_info=None):
    return math.nan
"""


def test_functions_of_the_users(tmp_path: Path) -> None:
    (tmp_path / "rewards_of_mine.py").write_text(CUSTOM)

    def scored(name: str) -> list[Reward]:
        spec = f"{tmp_path}/rewards_of_mine.py:{name}"
        config = RewardConfig(by_source={"rid*": "custom"}, custom_function=spec)
        with closing(RewardPool(config)) as pool:
            prompt, completions = item(["yes", "no"], source="riddles")
            prompt = replace(prompt, extra_info={"index": 7})
            mine, other = pool.score([(prompt, completions), item(["4"], "4", "arithmetic")])
        assert other.rewards[0].parts == {"exact_match": 1.0}
        return list(mine.rewards)

    assert [(r.score, r.accuracy) for r in scored("number")] == [(1.0, 1.0), (0.0, 0.0)]
    assert scored("verl_style")[0] == Reward(
        score=0.5,
        accuracy=1.0,
        parts={"custom": 0.5, "custom/style": 2.0, "custom/timeout": 1.0, "format": 0.25},
        answer="y",
    )
    assert [r.parts for r in scored("wrong")] == [CRASH, CRASH]
    assert [r.score for r in scored("extra")] == [1.0, 1.0]


def test_two_threads_get_the_scores_of_their_own_answers(bad_scorers: str) -> None:
    """A stream of groups and an evaluation beside it."""
    asked = [[item(["slow", "a", "b"], truth) for _ in range(4)] for truth in ("a", "b")]
    with (
        closing(RewardPool(RewardConfig(num_workers=2), scorers_module=bad_scorers)) as pool,
        ThreadPoolExecutor(2) as threads,
    ):
        a, b = threads.map(pool.score, asked)
    assert [reward.score for group in a for reward in group.rewards] == [0.0, 1.0, 0.0] * 4
    assert [reward.score for group in b for reward in group.rewards] == [0.0, 0.0, 1.0] * 4
