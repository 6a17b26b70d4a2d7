"""A worker extension for the tests; vLLM imports it in its workers by dotted path."""

from __future__ import annotations


class Extension:
    """Mixed into vLLM's worker: self.rank and self.model_runner are the worker's."""

    def hello(self, *args):
        return [self.rank, list(args)]

    def fail(self, text: str):
        raise ValueError(text)

    def sleep_for(self, seconds: float):
        import time

        time.sleep(seconds)
        return seconds
