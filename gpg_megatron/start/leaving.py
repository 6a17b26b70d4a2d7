"""How a launcher answers signals while it has ranks.

first SIGTERM, SIGUSR1 or Ctrl-C --> the ranks are asked to leave in order (host/leaving.py)
a second one, or trainer.grace_s later --> they are ended at once
SIGHUP --> at once; so the launcher of another host that has failed is answered
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from gpg_megatron.config.sections import Config
from gpg_megatron.host.leaving import ask_to_leave

POLITE = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
AT_ONCE = "SIGHUP,SIGQUIT"
"""For torch's agent, which raises SignalException by them; the ranks get the signal then."""


@contextmanager
def leaving_in_order(config: Config) -> Iterator[None]:
    """While the body runs ranks. A run that saves nothing has nothing to leave in order for."""
    from torch.distributed.elastic.multiprocessing.api import SignalException

    timers: list[threading.Timer] = []

    def answer(number: int, _frame: object) -> None:
        name = signal.Signals(number).name
        if timers or not config.checkpoint.save_freq:
            raise SignalException(f"signal {number}", sigval=signal.Signals(number))
        grace_s = config.trainer.grace_s
        # As a second signal.
        timers.append(threading.Timer(grace_s, os.kill, (os.getpid(), number)))
        timers[0].daemon = True
        timers[0].start()
        ask_to_leave(config.trainer.output_dir, f"asked by {name}")
        print(
            f"{name}: the run ends after this step, with a checkpoint; at once when asked again, "
            f"or in {grace_s} s",
            file=sys.stderr,
        )

    before = {number: signal.signal(number, answer) for number in POLITE}
    try:
        yield
    finally:
        for timer in timers:
            timer.cancel()
        for number, handler in before.items():
            signal.signal(number, handler)
