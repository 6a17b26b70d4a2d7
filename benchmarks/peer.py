"""gpg-train, as a user starts it, against TRL in an environment of its own and against vLLM alone.

    python -m benchmarks.peer --model DIR [--peer-python PYTHON] [--dtypes fp32 bf16] ...

All do the same work (benchmarks/peer_task.py) by turns, so that a busy machine slows all of them:
with no group dead and with half of them dead, which TRL computes too. Medians over the steps after
the first; memory is what all processes of a run hold at once (PSS), looked at so seldom that a core
spends a twentieth of its time on it (the kernel walks all pages). vLLM runs as it comes, and with
blocks of its cache as small as gpg-train's, in which answers share their prompt; the bound of a
step is the latter's rollout, or our own if that is faster, plus the update's matrix products at the
rate that a large one reaches here. Last line: JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import psutil
import torch

from benchmarks.machine import machine
from benchmarks.peer_task import rows
from gpg_megatron.host.device import set_threads
from gpg_megatron.host.peak import peak_flops_per_s
from gpg_megatron.observe.rundir import read_metrics
from gpg_megatron.rollout.engine_args import BLOCK_TOKENS
from gpg_megatron.types import DTYPES

HERE = Path(__file__).resolve().parent
TRL = "trl==1.16.0"
N_WARM_UP = 1
LOOK_S, LOOKS = 0.5, 0.05
"""The shortest time between two looks at the memory, and their share of the time."""
RUN_LIMIT_S = 3600
KV_CACHE_GB = 0.25
SHARES = {"none dead": 0.0, "half dead": 0.5}
SMALL_BLOCKS = "vLLM, small blocks"
BARE = {"vLLM": 0, SMALL_BLOCKS: BLOCK_TOKENS}
"""Tokens of a block; 0: vLLM chooses."""
HOW_TO = f"""without --peer-python TRL is left out. Its environment:
    python3 -m venv peer && peer/bin/pip install torch=={torch.__version__} {TRL} datasets
where launch/setup_cpu_env.sh says from where pip gets torch's build for CPUs"""


@dataclass(frozen=True, kw_only=True)
class Found:
    """One run."""

    steps: Sequence[Mapping[str, float]]
    """Seconds by phase: rollout, policy, step."""
    tokens: float
    """Of all responses of a step, median."""
    peak_gb: float
    """10^9 bytes, all processes together."""
    flops: float = 0.0
    """Of a step's matrix products, median; 0: not counted."""

    def seconds(self, phase: str) -> float:
        """Median over the steps that are no warm-up."""
        return median(step[phase] for step in self.steps[N_WARM_UP:])


def main() -> int:
    """Print the tables."""
    options = _options()
    print(machine(), flush=True)
    if options.peer_python is None:
        print(HOW_TO, flush=True)
    set_threads(None)
    found: dict[tuple[str, str, str], list[Found]] = {}
    for _ in range(options.repeats):
        for dtype in options.dtypes:
            for share in SHARES:
                found.setdefault(("gpg-train", dtype, share), []).append(
                    ours(options, dtype, share)
                )
                if options.peer_python:
                    found.setdefault(("TRL", dtype, share), []).append(trl(options, dtype, share))
            for who, block in BARE.items():
                found.setdefault((who, dtype, ""), []).append(bare(options, dtype, block))
            print(table(found), flush=True)
    peaks = {dtype: peak_flops_per_s("cpu", DTYPES[dtype]) for dtype in options.dtypes}
    print(bounds(found, peaks))
    print(json.dumps(summary(found, options.dtypes)))
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peer",
        description=__doc__,
        epilog=HOW_TO,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, type=Path, help="Hugging Face directory")
    parser.add_argument("--peer-python", type=Path, help="of an environment with TRL")
    parser.add_argument("--dtypes", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--samples", type=int, default=8, help="per prompt")
    parser.add_argument("--tokens", type=int, default=32, help="at most, of a response")
    parser.add_argument("--steps", type=int, default=4, help=f"more than {N_WARM_UP}")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("overrides", nargs="*", metavar="a.b=value", help="for gpg-train")
    options = parser.parse_intermixed_args()
    if options.steps <= N_WARM_UP:
        parser.error(f"--steps: expected more than {N_WARM_UP}")
    return options


def ours(options: argparse.Namespace, dtype: str, share: str) -> Found:
    """gpg-train with its defaults."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        batch = rows(options.prompts, SHARES[share])
        with (folder / "train.jsonl").open("w") as file:
            for text, kind in batch * options.steps:
                row = {
                    "data_source": "peer",
                    "prompt": [{"role": "user", "content": text}],
                    "reward_model": {"style": "rule", "ground_truth": kind},
                }
                file.write(json.dumps(row) + "\n")
        config = {
            "data": {
                "train_files": [str(folder / "train.jsonl")],
                "apply_chat_template": False,
                "max_prompt_length": 64,
                "shuffle": False,
            },
            "model": {"path": str(options.model), "dtype": dtype},
            "reward": {"scorer": "custom", "custom_function": f"{HERE}/peer_task.py:compute_score"},
            "policy": {"lr": 1e-5},
            "rollout": {
                "n": options.samples,
                "max_response_length": options.tokens,
                "dtype": dtype,
                "kv_cache_gb": KV_CACHE_GB,
            },
            "checkpoint": {"save_freq": 0, "hf_export": "never"},
            "trainer": {
                "train_batch_size": options.prompts,
                "total_training_steps": options.steps,
                "test_freq": 0,
                "device": "cpu",
                "output_dir": str(folder / "run"),
            },
        }
        (folder / "config.yaml").write_text(json.dumps(config))
        command = [sys.executable, "-m", "gpg_megatron.start.train"]
        command += ["--config", str(folder / "config.yaml"), *options.overrides]
        _, peak_gb = watched(command)
        steps = [row for row in read_metrics(folder / "run") if row["step"] > 0]
    phases = ("rollout", "policy", "sync", "step")
    return Found(
        steps=[{name: row[f"timing/{name}_s"] for name in phases} for row in steps],
        tokens=median(row["response/tokens"] for row in steps[N_WARM_UP:]),
        peak_gb=peak_gb,
        flops=median(row["policy/flops"] for row in steps[N_WARM_UP:]),
    )


def trl(options: argparse.Namespace, dtype: str, share: str) -> Found:
    """TRL's GRPOTrainer in its own environment."""
    numbers = (options.steps, options.prompts, options.samples, options.tokens, SHARES[share])
    command = [options.peer_python, HERE / "peer_trl.py", options.model, dtype, *numbers]
    return _found(*watched([*map(str, command)]))


def bare(options: argparse.Namespace, dtype: str, block: int) -> Found:
    """vLLM in one process."""
    numbers = (options.steps, options.prompts, options.samples, options.tokens, block, KV_CACHE_GB)
    command = [sys.executable, "-m", "benchmarks.peer_vllm", options.model, dtype, *numbers]
    return _found(*watched([*map(str, command)]))


def _found(printed: str, peak_gb: float) -> Found:
    # vLLM logs beside it.
    line = next(x for x in reversed(printed.splitlines()) if x.startswith('{"steps"'))
    said = json.loads(line)
    return Found(steps=said["steps"], tokens=median(said["tokens"][N_WARM_UP:]), peak_gb=peak_gb)


def watched(command: Sequence[str]) -> tuple[str, float]:
    """What a command printed, and the most memory that it and all below it held, 10^9 bytes."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=out, stderr=errors, text=True)
        peak = [0.0]
        done = threading.Event()

        def watch() -> None:
            spent = 0.0
            while not done.wait(max(LOOK_S, spent / LOOKS)):
                begin = time.perf_counter()
                peak[0] = max(peak[0], held_gb(process.pid))
                spent = time.perf_counter() - begin

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            code = process.wait(RUN_LIMIT_S)
        finally:
            done.set()
            watcher.join()
            process.kill()
        out.seek(0)
        errors.seek(0)
        if code:
            sys.exit(f"{' '.join(command[:3])} ... ended with {code}: {errors.read()[-2000:]}")
        return out.read(), peak[0]


def held_gb(pid: int) -> float:
    """Of a process and all below it; pages that several map count once."""
    total = 0
    with suppress(psutil.NoSuchProcess):
        for process in (root := psutil.Process(pid), *root.children(recursive=True)):
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                total += process.memory_full_info().pss
    return total / 1e9


Results = Mapping[tuple[str, str, str], Sequence[Found]]


def _median(runs: Sequence[Found], phase: str) -> float:
    return median(run.seconds(phase) for run in runs)


def _memory(runs: Sequence[Found]) -> float:
    return median(run.peak_gb for run in runs)


def _rate(runs: Sequence[Found]) -> float:
    """Tokens of responses a second of rollout."""
    return median(run.tokens for run in runs) / _median(runs, "rollout")


def table(found: Results) -> str:
    """Markdown."""
    head = ("who", "type", "groups", "rollout, s", "update, s", "step, s", "tokens", "memory, GB")
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for (who, dtype, share), runs in sorted(found.items(), key=lambda item: item[0][1:]):
        phases = runs[0].steps[0]
        cells = [
            f"{_median(runs, name):.2f}" if name in phases else ""
            for name in ("rollout", "policy", "step")
        ]
        tokens = median(run.tokens for run in runs)
        cells += [f"{tokens:.0f}", f"{_memory(runs):.2f}"]
        lines.append("| " + " | ".join([who, dtype, share, *cells]) + " |")
    return "\n".join(lines)


def bounds(found: Results, peaks: Mapping[str, float]) -> str:
    """What a step of gpg-train cannot be under, and what TRL's would be over it."""
    lines = []
    for (who, dtype, share), runs in found.items():
        if who != "gpg-train":
            continue
        bare = _median(found[SMALL_BLOCKS, dtype, ""], "rollout")
        rollout = min(bare, _median(runs, "rollout"))
        products = median(run.flops for run in runs) / peaks[dtype]
        step, least = _median(runs, "step"), rollout + products
        line = (
            f"{dtype}, {share}: step {step:.2f} s; rollout {rollout:.2f} s and "
            f"products at {peaks[dtype] / 1e9:.0f} GFLOP/s {products:.2f} s: at least {least:.2f} s"
        )
        if peer := found.get(("TRL", dtype, share)):
            theirs = _median(peer, "step")
            line += f"; TRL over it {theirs / step:.2f}, over the bound {theirs / least:.2f}"
        lines.append(line)
    return "\n".join(lines)


def summary(found: Results, dtypes: Sequence[str]) -> dict[str, dict[str, float]]:
    """The ratios, by type."""
    out: dict[str, dict[str, float]] = {}

    def put(name: str, dtype: str, value: float) -> None:
        out.setdefault(name, {})[dtype] = round(value, 2)

    for dtype in dtypes:
        names = ("rollout_over_bare_vllm", "rollout_over_bare_vllm_small_blocks")
        own = _rate(found["gpg-train", dtype, "none dead"])
        for name, who in zip(names, BARE, strict=True):
            put(name, dtype, own / _rate(found[who, dtype, ""]))
        for share in SHARES:
            runs, peer = found["gpg-train", dtype, share], found.get(("TRL", dtype, share))
            if peer:
                ratio = _median(peer, "step") / _median(runs, "step")
                put(f"step_over_trl_{share.replace(' ', '_')}", dtype, ratio)
                if share == "none dead":
                    put("memory_over_trl", dtype, _memory(runs) / _memory(peer))
    return out


if __name__ == "__main__":
    sys.exit(main())
