"""Does vLLM's packed CPU linear decode faster than torch's linear on the plain weight?

One engine, two kernels for every linear layer, switched between the runs of a pair:

    python -m benchmarks.decode_packed --model smollm2-135m --dtype bfloat16

The last line is JSON: decode tokens per second of both kernels (best and median of the runs)
and the median over the pairs of packed / plain, for each batch size; and the seconds of a whole
update with either kernel. Seconds are the process's CPU seconds, and one thread computes, so that
other work on the machine counts for little.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

import torch

SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 1536,
        "vocab_size": 49152,
    },
    "qwen2-1m": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": 128,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 384,
        "vocab_size": 320,
    },
}
STEPS = {1: 16, 8: 8, 64: 4}
"""Sequences at once -> tokens decoded of each."""
EXTENSION = "benchmarks.decode_packed.TwoKernels"


class TwoKernels:
    """Worker extension: every linear layer keeps its packed kernel and the plain weight."""

    model_runner: Any
    """The worker's."""

    def bench_prepare(self) -> int:
        """Make the plain weights; returns the number of layers."""
        from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
        from vllm.model_executor.model_loader.reload.meta import materialize_meta_tensor

        # vLLM's attention takes AMX tiles that nobody has asked the kernel for if no matrix
        # product of more than a few rows came before: illegal instruction.
        torch.cpu._init_amx()
        self.bench_layers: list[Any] = []
        for layer in self.model_runner.get_model().modules():
            if not hasattr(layer, "cpu_linear"):
                continue
            if not layer.weight.numel():
                meta = get_layerwise_info(layer).restore_metadata[0]["weight"]
                layer.weight = materialize_meta_tensor(meta)
                torch.nn.init.uniform_(layer.weight, -1e-3, 1e-3)
            bias = getattr(layer, "bias", None)
            biases = None if bias is None else (bias.data, bias.data.to(layer.weight.dtype))
            self.bench_layers.append((layer, layer.cpu_linear, biases))
        return len(self.bench_layers)

    def bench_use(self, kernel: str) -> None:
        for layer, packed, biases in self.bench_layers:
            plain = kernel == "plain"
            layer.cpu_linear = torch.nn.functional.linear if plain else packed
            if biases is not None:
                layer.bias.data = biases[plain]

    @torch.no_grad()
    def bench_update(self, kernel: str) -> float:
        """CPU seconds to write every layer's weight, and to pack it for the packed kernel."""
        sources = [torch.rand_like(layer.weight) for layer, _, _ in self.bench_layers]
        start = time.process_time()
        for i, (layer, _, biases) in enumerate(self.bench_layers):
            if kernel == "plain":
                layer.weight.copy_(sources[i])
                continue
            plain = layer.weight
            layer.weight = torch.nn.Parameter(sources[i].clone(), requires_grad=False)
            layer.quant_method.process_weights_after_loading(layer)
            layer.weight = plain
            self.bench_layers[i] = (layer, layer.cpu_linear, biases)
        return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=list(SHAPES), default="smollm2-135m")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--pairs", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        engine = _start(Path(folder), args.model, args.dtype)
        result = vars(args) | {"layers": engine.collective_rpc("bench_prepare")[0]}
        result |= {str(batch): _compare(engine, batch, args.pairs) for batch in STEPS}
        for kernel in ("plain", "packed"):
            seconds = [
                engine.collective_rpc("bench_update", args=(kernel,))[0] for _ in range(args.pairs)
            ]
            result[f"update_{kernel}_s"] = round(statistics.median(seconds), 4)
    print(json.dumps(result))


def _start(folder: Path, model: str, dtype: Literal["float32", "bfloat16"]) -> Any:
    """An engine in this process, with random weights."""
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "passive",
    }
    from vllm import LLM

    config = SHAPES[model] | {
        "tie_word_embeddings": True,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "rope_theta": 10000.0,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return LLM(
        model=str(folder),
        dtype=dtype,
        load_format="dummy",
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=128,
        max_num_seqs=max(STEPS),
        max_num_batched_tokens=2048,
        kv_cache_memory_bytes=1 << 29,
        enable_prefix_caching=False,
        distributed_executor_backend="uni",
        worker_extension_cls=EXTENSION,
    )


def _compare(engine: Any, batch: int, pairs: int) -> dict[str, float]:
    """Pairs of runs, one with each kernel; the first pair only warms up."""
    speeds: dict[str, list[float]] = {"packed": [], "plain": []}
    for pair in range(pairs + 1):
        # Alternating who goes first: the machine may slow down or speed up during a pair.
        for kernel in sorted(speeds, reverse=bool(pair % 2)):
            engine.collective_rpc("bench_use", args=(kernel,))
            speeds[kernel].append(_decode_speed(engine, batch))
    timed = {kernel: values[1:] for kernel, values in speeds.items()}
    ratios = [a / b for a, b in zip(timed["packed"], timed["plain"], strict=True)]
    result = {"median_ratio": statistics.median(ratios)}
    for kernel, values in timed.items():
        result[f"{kernel}_best"] = max(values)
        result[f"{kernel}_median"] = statistics.median(values)
    return {name: round(value, 2) for name, value in result.items()}


def _decode_speed(engine: Any, batch: int) -> float:
    """Tokens per CPU second."""
    start = time.process_time()
    # A prompt of one token: the prefill is a step like any other.
    engine.generate([{"prompt_token_ids": [2]}] * batch, _sampling(STEPS[batch]), use_tqdm=False)
    return batch * STEPS[batch] / (time.process_time() - start)


def _sampling(n_tokens: int) -> Any:
    from vllm import SamplingParams

    return SamplingParams(
        temperature=1.0, seed=0, max_tokens=n_tokens, ignore_eos=True, detokenize=False
    )


if __name__ == "__main__":
    main()
