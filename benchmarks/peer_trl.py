"""TRL's trainer on the work of benchmarks.peer; runs in TRL's own environment.

    PYTHON peer_trl.py MODEL DTYPE STEPS PROMPTS SAMPLES TOKENS DEAD

Last line: JSON, seconds of each step by phase and response tokens.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

from datasets import Dataset
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

sys.path.insert(0, str(Path(__file__).parent))
from peer_task import rows, score  # type: ignore[import-not-found]


def main() -> None:
    model, dtype, *numbers, dead = sys.argv[1:]
    steps, prompts, samples, tokens = map(int, numbers)
    marks: list[tuple[str, float]] = []
    lengths: list[int] = []

    def reward(completions, kind, completion_ids, **_):  # type: ignore[no-untyped-def]
        marks.append(("sampled", time.perf_counter()))
        lengths.append(sum(map(len, completion_ids)))
        return [score(text, k) for text, k in zip(completions, kind, strict=True)]

    class Marks(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_, **__):  # type: ignore[no-untyped-def]
            marks.append(("begin", time.perf_counter()))

        def on_step_end(self, *_, **__):  # type: ignore[no-untyped-def]
            marks.append(("end", time.perf_counter()))

    batch = rows(prompts, float(dead))
    data = [{"prompt": text, "kind": kind} for text, kind in batch * steps]
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder,
            per_device_train_batch_size=samples,
            gradient_accumulation_steps=prompts,
            num_generations=samples,
            max_completion_length=tokens,
            max_steps=steps,
            learning_rate=1e-5,
            beta=0.0,
            temperature=1.0,
            loss_type="dapo",
            scale_rewards="none",
            shuffle_dataset=False,
            bf16=dtype == "bf16",
            model_init_kwargs={"dtype": {"bf16": "bfloat16", "fp32": "float32"}[dtype]},
            gradient_checkpointing=False,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = GRPOTrainer(model, reward, args=config, train_dataset=Dataset.from_list(data))
        trainer.add_callback(Marks())
        trainer.train()
    times = {name: [t for n, t in marks if n == name] for name in ("begin", "sampled", "end")}
    phases = [
        {"rollout": s - b, "policy": e - s, "step": e - b}
        for b, s, e in zip(*times.values(), strict=True)
    ]
    print(json.dumps({"steps": phases, "tokens": lengths}))


if __name__ == "__main__":
    main()
