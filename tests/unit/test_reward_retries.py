"""Retries and outages of a scorer that asks a service, on a clock of their own; and a real one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from gpg_megatron.config.reward import RewardConfig
from gpg_megatron.errors import RunError
from gpg_megatron.reward.pool import RewardPool
from gpg_megatron.reward.retries import Retries
from gpg_megatron.reward.worker import Question
from gpg_megatron.types import Completion, Prompt, Reward
from tests.samples import float32, int32

GOOD = Reward(score=1.0, accuracy=1.0, parts={"custom": 1.0})
QUESTIONS = [
    Question(scorer="custom", response=f"{i}", ground_truth="", data_source="d", extra_info=None)
    for i in range(4)
]


class Service:
    """Answers as a function of the time says; time passes in pauses and by a second a question."""

    def __init__(self, answers: Callable[[float, str], bool]) -> None:
        self.answers = answers
        self.now = 0.0
        self.asked: list[str] = []
        self.pauses: list[float] = []
        self.said: list[str] = []

    def judge(self, questions: Sequence[Question]) -> list[Reward]:
        rewards = []
        for question in questions:
            self.now += 1.0
            self.asked.append(question.response)
            right = self.answers(self.now, question.response)
            failed = Reward(score=0.0, accuracy=0.0, parts={"timeout": 1.0})
            rewards.append(GOOD if right else failed)
        return rewards

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.pauses.append(seconds)

    def run(self, **keys: float) -> list[bool]:
        """Which questions got a verdict."""
        config = RewardConfig(**keys)  # type: ignore[arg-type]
        retries = Retries(
            config=config, say=self.said.append, sleep=self.sleep, clock=lambda: self.now
        )
        return [reward == GOOD for reward in retries(self.judge, QUESTIONS)]


def test_only_answers_without_a_verdict_are_judged_again() -> None:
    service = Service(lambda now, text: text != "2" or now > 6)
    assert service.run(retries=3, retry_wait_s=0.5) == [True] * 4
    assert service.asked == ["0", "1", "2", "3", "2", "2"] and service.pauses == [0.5, 1.0]
    assert not service.said


def test_one_that_never_gets_a_verdict_among_others_is_no_outage() -> None:
    service = Service(lambda now, text: text != "2")
    assert service.run(retries=2, retry_wait_s=1) == [True, True, False, True]
    assert service.asked.count("2") == 3
    assert Service(lambda now, text: False).run() == [False] * 4, "without retries as before"


def test_an_outage_is_waited_for_and_then_all_are_judged() -> None:
    service = Service(lambda now, text: now > 200)
    assert service.run(retries=1, retry_wait_s=16) == [True] * 4
    assert service.pauses == [16.0, 32.0, 60.0, 60.0, 60.0][: len(service.pauses)]
    assert service.asked[-4:] == ["0", "1", "2", "3"] and service.asked[8:-4] == ["0"] * 5
    assert service.said[0] == "no answer of a batch got a verdict: the run waits for its scorer"
    assert service.said[1].startswith("the scorer answers again after ")


def test_an_outage_without_an_end_ends_the_run() -> None:
    with pytest.raises(RunError, match="the scorer custom gave no verdict for"):
        Service(lambda now, text: False).run(retries=1, outage_limit_s=500)


class Judge(BaseHTTPRequestHandler):
    """Refuses the first requests."""

    refusals = 5

    def do_GET(self) -> None:
        type(self).refusals -= 1
        self.send_response(200 if type(self).refusals < 0 else 503)
        self.end_headers()
        self.wfile.write(b"1.0")

    def log_message(self, *_: object) -> None: ...


def test_a_service_over_http_that_is_out_for_a_while(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    (tmp_path / "judge.py").write_text(
        "from urllib.request import urlopen\n"
        "def compute_score(data_source, solution_str, ground_truth, extra_info=None):\n"
        f"    return float(urlopen('http://127.0.0.1:{server.server_port}', timeout=5).read())\n"
    )
    config = RewardConfig(
        scorer="custom",
        custom_function=f"{tmp_path / 'judge.py'}:compute_score",
        retries=1,
        retry_wait_s=0.01,
    )
    prompt = Prompt(id="p", token_ids=int32((1,)), messages=(), ground_truth="", data_source="d")
    completions = [
        Completion(
            prompt_id="p", index=i, token_ids=int32(()), logprobs=float32(()),
            finish_reason="stop", text="", versions=(),
        )
        for i in range(2)
    ]  # fmt: skip
    pool = RewardPool(config)
    try:
        (group,) = pool.score([(prompt, completions)])
    finally:
        pool.close()
        server.shutdown()
    assert [reward.score for reward in group.rewards] == [1.0, 1.0]
    assert "the run waits for its scorer" in capfd.readouterr().err
