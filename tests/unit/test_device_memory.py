"""What a process that keeps freed memory holds afterwards."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from gpg_megatron.host.allocator import allocator_variables

PROGRAM = """
import json
import os
import sys
import psutil
import torch
from gpg_megatron.host.allocator import keep_freed_memory
from gpg_megatron.rollout.forked import keep_freed_memory_a_while

if sys.argv[1] == "keeps":
    keep_freed_memory()
if sys.argv[1] == "keeps a while":
    keep_freed_memory_a_while()
held = lambda: psutil.Process().memory_info().rss / 2**20
before = held()
block = torch.ones(200 * 2**18)  # 200 MiB
del block
maps = open("/proc/self/maps").read()
print(json.dumps([held() - before, "jemalloc" in maps, os.environ.get("MALLOC_CONF")]))
"""
BARE = {name: x for name, x in os.environ.items() if name not in ("LD_PRELOAD", "MALLOC_CONF")}


def left(what: str, environment: dict[str, str]) -> tuple[float, bool, str | None]:
    """MiB that a process holds of a block that it has freed, whether jemalloc is in it, and the
    options that processes below it would get."""
    command = [sys.executable, "-c", PROGRAM, what]
    run = subprocess.run(command, stdout=-1, check=True, env=environment)
    held, is_there, options = json.loads(run.stdout)
    return held, is_there, options


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator, and jemalloc")
def test_freed_memory_stays_where_a_rank_asks_for_it() -> None:
    assert left("keeps", BARE)[0] > 190.0
    assert left("gives back", BARE)[0] < 20.0
    held, is_there, options = left("keeps", BARE | allocator_variables(BARE))
    assert held > 190.0
    assert is_there
    # Of an engine.
    below = BARE | allocator_variables(BARE | {"MALLOC_CONF": options or ""})
    assert left("gives back", below)[0] < 20.0
    assert left("keeps a while", below)[0] > 190.0
    at_once = below | {"MALLOC_CONF": f"{options},dirty_decay_ms:0"}
    assert left("keeps a while", at_once)[0] < 20.0


def test_what_the_user_sets_stays() -> None:
    assert allocator_variables({"LD_PRELOAD": "libtcmalloc.so"}) == {}
    assert allocator_variables({"MALLOC_CONF": "narenas:2"})["MALLOC_CONF"] == "narenas:2"
