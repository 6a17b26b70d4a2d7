"""vLLM engines that are loaded and then updated through the Installer; run as a script.

    python install_engine.py JOBS RESULTS

JOBS is a JSON file with a list of {"load": DIR, "updates": [DIR, ...], "dtype": ..., "tp": N,
"eager": ..., "prompts": [...]}. RESULTS gets a list with the log-probs of the prompts for the
loaded weights, after the probe and after every update, and what the worker of rank 0 says about
its modules. One process for several engines: importing vLLM takes longer than starting a tiny one.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from gpg_megatron.bridge.install import Installer
from gpg_megatron.host.reaper import new_run_id, start_reaper


class Extension:
    """Worker extension."""

    model_runner: Any
    """The worker's."""

    def probe(self) -> dict[str, str]:
        self.installer = Installer(self.model_runner.get_model())
        return {part.name: part.policy for part in self.installer._parts}

    def packed_away(self) -> list[str]:
        """Modules whose weight has no elements: vLLM put it into a kernel of its own. Which do,
        depends on the type and on what the processor can do."""
        modules = self.model_runner.get_model().named_modules()
        weights = ((name, getattr(module, "weight", None)) for name, module in modules)
        return [name for name, weight in weights if weight is not None and not weight.numel()]

    def finish_early(self) -> str:
        """The error of an update of which nothing has arrived."""
        self.installer.begin()
        try:
            self.installer.finish()
        except RuntimeError as error:
            return str(error)
        return "no error"

    def update(self, folder: str, reverse: bool) -> list[int]:
        """Write a checkpoint; returns the largest staging seen and what is left, in bytes."""
        from safetensors.torch import load_file

        tensors = load_file(Path(folder) / "model.safetensors")
        if not hasattr(self, "destinations"):
            shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
            self.destinations = self.installer.record(shapes)
        self.installer.begin()
        most = 0
        for d in reversed(self.destinations) if reverse else self.destinations:
            target = self.installer.target(d.view.parameter)
            most = max(most, self.staged_bytes())
            view = target.as_strided(d.view.shape, d.view.stride, d.view.offset)
            view.copy_(tensors[d.hf_name][d.hf.slices])
            self.installer.wrote(d.view.parameter, d.hf.numel)
        self.installer.finish()
        return [most, self.staged_bytes()]

    def staged_bytes(self) -> int:
        """What staging tensors hold right now."""
        return sum(t.nbytes for part in self.installer._parts for t in part.staging.values())


def main(jobs: Path, results: Path) -> None:
    os.environ |= {
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "passive",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    start_reaper(new_run_id())  # a tensor-parallel engine leaves shared memory behind
    results.write_text(json.dumps([run(job) for job in json.loads(jobs.read_text())]))


def run(job: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = LLM(
        model=job["load"],
        dtype=job["dtype"],
        tensor_parallel_size=job["tp"],
        distributed_executor_backend="uni" if job["tp"] == 1 else "mp",
        enforce_eager=job["eager"],
        skip_tokenizer_init=True,
        max_model_len=64,
        max_num_seqs=8,
        kv_cache_memory_bytes=1 << 26,
        enable_prefix_caching=False,
        worker_extension_cls="tests.stack.install_engine.Extension",
    )
    result: dict[str, Any] = {"loaded": logprobs(llm, job["prompts"])}
    result["packed_away"] = llm.collective_rpc("packed_away")[0]
    result["policies"] = llm.collective_rpc("probe")[0]
    result["probed"] = logprobs(llm, job["prompts"])
    result["updates"] = []
    for i, folder in enumerate(job["updates"]):
        staged = llm.collective_rpc("update", args=(folder, bool(i % 2)))[0]
        result["updates"].append({"staged": staged, "logprobs": logprobs(llm, job["prompts"])})
    result["finish_early"] = llm.collective_rpc("finish_early")[0]
    llm.llm_engine.engine_core.shutdown()
    del llm
    cleanup_dist_env_and_memory()
    return result


def logprobs(llm: Any, prompts: list[list[int]]) -> list[float]:
    """Of every prompt token but the first, all prompts in a row."""
    from vllm import SamplingParams

    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        SamplingParams(max_tokens=2, prompt_logprobs=0, detokenize=False, ignore_eos=True),
        use_tqdm=False,
    )
    return [
        position[token].logprob
        for output, prompt in zip(outputs, prompts, strict=True)
        for position, token in zip(output.prompt_logprobs[1:], prompt[1:], strict=True)
    ]


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
