"""vLLM alone, in one process, on the prompts of benchmarks.peer.

    python -m benchmarks.peer_vllm MODEL DTYPE STEPS PROMPTS SAMPLES TOKENS KV_CACHE_GB

Last line: JSON, seconds of each batch and its response tokens.
"""

from __future__ import annotations

import json
import os
import sys
import time


def main() -> None:
    model, dtype, *numbers, cache_gb = sys.argv[1:]
    steps, prompts, samples, tokens = map(int, numbers)
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = cache_gb
    from vllm import LLM, SamplingParams

    from benchmarks.peer_task import rows
    from gpg_megatron.types import DTYPES

    engine = LLM(model=model, dtype=DTYPES[dtype], max_model_len=64 + tokens)  # type: ignore[arg-type]
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
