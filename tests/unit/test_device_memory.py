"""What a process that keeps freed memory holds afterwards."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import sys
import psutil
import torch
from gpg_megatron.host.device import keep_freed_memory

if sys.argv[1] == "keeps":
    keep_freed_memory()
held = lambda: psutil.Process().memory_info().rss / 2**20
before = held()
block = torch.ones(200 * 2**18)  # 200 MiB
del block
print(held() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_memory_stays_where_a_rank_asks_for_it() -> None:
    kept, given_back = (
        float(subprocess.run([sys.executable, "-c", PROGRAM, what], stdout=-1, check=True).stdout)
        for what in ("keeps", "gives back")
    )
    assert kept > 190.0
    assert given_back < 20.0
