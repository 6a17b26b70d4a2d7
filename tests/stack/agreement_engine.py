"""Samples of real vLLM engines for the tests of agreement; run as a script.

    python agreement_engine.py JOBS RESULTS

JOBS is a JSON file with a list of {"model": DIR, "dtype": ..., "prompts": [[token, ...], ...]}.
RESULTS gets, for each of them, a list of [prompt, response, log-probs of the response]. One
process for all engines: importing vLLM takes longer than starting a tiny one.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

TOKENS = 32


def main(jobs: Path, results: Path) -> None:
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
    }
    results.write_text(json.dumps([_sample(job) for job in json.loads(jobs.read_text())]))


def _sample(job: dict[str, Any]) -> list[Any]:
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=job["model"],
        dtype=job["dtype"],
        enforce_eager=True,
        max_model_len=128,
        max_num_seqs=16,
        logprobs_mode="processed_logprobs",
        generation_config="vllm",
    )
    params = SamplingParams(max_tokens=TOKENS, logprobs=0, seed=3, detokenize=False)
    prompts: Any = [{"prompt_token_ids": prompt} for prompt in job["prompts"]]
    outputs: Any = llm.generate(prompts, params)
    return [
        [
            prompt,
            list(sample.token_ids),
            [
                at[token].logprob
                for token, at in zip(sample.token_ids, sample.logprobs, strict=True)
            ],
        ]
        for prompt, output in zip(job["prompts"], outputs, strict=True)
        for sample in output.outputs
    ]


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
