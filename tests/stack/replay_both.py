"""An engine and a policy for test_replay.py; run as a script.

    python -m tests.stack.replay_both MODEL FOLDER SAMPLES TOKENS

FOLDER gets samples.pickle, what the engine answered, and seen.json: log-probs of the engine and of
the policy (with the engine's experts, without, and with others), and the metrics of updates.
"""

from __future__ import annotations

import json
import pickle
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.router_replay import answers, logprobs, make_prompts, one_policy, update
from gpg_megatron.types import NO_ROUTING
from tests.stack.test_replay import other_experts

PROMPTS = 5


def main(model: Path, folder: Path, n: int, max_tokens: int) -> None:
    prompts = make_prompts(model, None, PROMPTS)
    # The same tokens in another group: nothing that was computed for one is missing in the other.
    prompts.append(replace(prompts[0], id="again"))
    samples = answers(model, prompts, dtype="fp32", n=n, max_tokens=max_tokens)
    (folder / "samples.pickle").write_bytes(pickle.dumps(samples))
    others = [other_experts(sample) for sample in samples]
    bare = [replace(sample, routing=NO_ROUTING) for sample in samples]
    with one_policy(model, "fp32") as policy:
        seen = {
            "engine": np.concatenate([s.rollout_logprobs for s in samples]).tolist(),
            "with": logprobs(policy, samples).tolist(),
            "without": logprobs(policy, bare).tolist(),
            "other": logprobs(policy, others).tolist(),
            "engine's": update(policy, samples),
            "other's": update(policy, others),
        }
    (folder / "seen.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:5]))
