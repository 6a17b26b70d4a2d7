"""Answers without a verdict are judged again, and a service that is out is waited for.

judge --> all have a verdict: done
  ^  '--> some have none: pause, twice as long each time, and those again (reward.retries times)
  '------ none has one: the service is out; one answer is tried until it gets a verdict
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gpg_megatron.config.reward import RewardConfig
from gpg_megatron.errors import RunError
from gpg_megatron.reward.worker import Question
from gpg_megatron.types import Reward

MAX_PAUSE_S = 60.0
PASSING = frozenset({"timeout", "crash"})
"""Parts of answers without a verdict that may have one the next time."""
Judge = Callable[[Sequence[Question]], Sequence[Reward]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Retries:
    """How a pool judges."""

    config: RewardConfig
    say: Callable[[str], None]
    """For the person who watches."""
    sleep: Callable[[float], None] = time.sleep
    clock: Callable[[], float] = time.monotonic
    """Seconds."""

    def __call__(self, judge: Judge, questions: Sequence[Question]) -> list[Reward]:
        """One reward for each question, in their order.

        Raises:
            RunError: with retries, no answer had a verdict for reward.outage_limit_s.
        """
        rewards = list(judge(questions))
        for attempt in range(self.config.retries):
            if not (failed := _failed(rewards)):
                return rewards
            self._pause(attempt)
            again = judge([questions[i] for i in failed])
            for i, reward in zip(failed, again, strict=True):
                rewards[i] = reward
        if self.config.retries and questions and len(_failed(rewards)) == len(questions):
            self._wait_for_a_verdict(judge, questions[0])
            return self(judge, questions)
        return rewards

    def _wait_for_a_verdict(self, judge: Judge, question: Question) -> None:
        begin, attempt = self.clock(), self.config.retries
        self.say("no answer of a batch got a verdict: the run waits for its scorer")
        while _failed(judge([question])):
            if (waited := self.clock() - begin) > self.config.outage_limit_s:
                raise RunError(
                    f"the scorer {question.scorer} gave no verdict for {waited:.0f} s "
                    f"(reward.outage_limit_s={self.config.outage_limit_s:g})"
                )
            self._pause(attempt)
            attempt += 1
        self.say(f"the scorer answers again after {self.clock() - begin:.0f} s")

    def _pause(self, attempt: int) -> None:
        self.sleep(min(MAX_PAUSE_S, self.config.retry_wait_s * 2.0 ** min(attempt, 30)))


def _failed(rewards: Sequence[Reward]) -> list[int]:
    return [i for i, reward in enumerate(rewards) if PASSING & reward.parts.keys()]
