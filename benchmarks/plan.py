"""How long planning takes, and how evenly the bytes are spread, on up to 1,024 ranks.

    python -m benchmarks.plan [--case NAME ...]

Nothing is sent. Routes are those of one engine; every rank makes them all. Seconds are CPU
seconds of this process, for what one rank does (hf_shapes, held, routes, fingerprint, outgoing)
and for what one worker does (incoming). GB are 1e9 bytes of bf16 elements, over all engines.

    sent      by all ranks together; "bound" is what the workers' parameters hold, the least
    share     sent / ranks; "most" is the rank that sends most, over the share
    senders   ranks that worker 0 of engine 0 hears from; buckets: their messages to it

The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from benchmarks.large_layouts import CASES, ITEM, LargeCase, buckets_of, plan

_COLUMNS = (
    "model", "layout", "ranks", "workers", "routes", "rank_s", "worker_s", "sent_gb", "bound_gb",
    "share_gb", "most", "senders", "buckets",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [case.name for case in CASES]
    parser.add_argument("--case", nargs="+", choices=names, default=names)
    chosen = parser.parse_args().case
    rows = []
    for case in CASES:
        if case.name in chosen:
            rows.append(measure(case))
            print(f"planned {case.name}", flush=True)
    print(_table(rows))
    print(json.dumps(rows))


def measure(case: LargeCase) -> dict[str, Any]:
    """One row of the table."""
    planned = plan(case)
    seconds = dict(planned.seconds)
    worker_s = seconds.pop("incoming")
    received = buckets_of(planned.routes, engine=0, worker=0)
    n_bytes = sum(planned.sent.values()) * ITEM
    world = case.grid.world_size
    return {
        "model": case.name,
        "layout": case.layout,
        "ranks": world,
        "workers": case.n_engines * case.engine.tp_size,
        "routes": len(planned.routes),
        "rank_s": round(sum(seconds.values()), 2),
        "worker_s": round(worker_s, 2),
        "sent_gb": round(n_bytes / 1e9, 1),
        "bound_gb": round(planned.needed * ITEM / 1e9, 1),
        "share_gb": round(n_bytes / world / 1e9, 2),
        "most": round(planned.over_share, 3),
        "senders": len(received),
        "buckets": sum(map(len, received.values())),
        "steps_s": {name: round(value, 3) for name, value in planned.seconds.items()},
    }


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [_COLUMNS, *([str(row[name]) for name in _COLUMNS] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(_COLUMNS))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


if __name__ == "__main__":
    main()
