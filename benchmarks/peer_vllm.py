"""vLLM alone, in one process, on the prompts of benchmarks.peer.

    python -m benchmarks.peer_vllm MODEL DTYPE STEPS PROMPTS SAMPLES TOKENS BLOCK KV_CACHE_GB

BLOCK: tokens of a block of the cache; 0: vLLM chooses. Last line: JSON, seconds of each batch and
its response tokens.
"""

from __future__ import annotations

import json
import os
import sys
import time

ENVIRONMENT = {
    # Without the first it has a worker of its own; "auto" leaves one of two cores idle.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}


def main() -> None:
    model, dtype, *numbers, cache_gb = sys.argv[1:]
    steps, prompts, samples, tokens, block = map(int, numbers)
    os.environ |= ENVIRONMENT
    from vllm import LLM, SamplingParams

    from benchmarks.peer_task import rows
    from gpg_megatron.types import DTYPES

    engine = LLM(
        model=model,
        dtype=DTYPES[dtype],  # type: ignore[arg-type]  # as its own enumeration
        max_model_len=64 + tokens,
        kv_cache_memory_bytes=int(float(cache_gb) * 2**30),
        block_size=block or None,
    )
    params = SamplingParams(n=samples, temperature=1.0, max_tokens=tokens)
    texts = [text for text, _ in rows(prompts, 0.0)]
    took, lengths = [], []
    for _ in range(steps):
        begin = time.perf_counter()
        done = engine.generate(texts, params, use_tqdm=False)
        took.append({"rollout": time.perf_counter() - begin})
        lengths.append(sum(len(x.token_ids) for request in done for x in request.outputs))
    print(json.dumps({"steps": took, "tokens": lengths}))


if __name__ == "__main__":
    main()
