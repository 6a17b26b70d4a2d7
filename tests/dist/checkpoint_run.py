"""A run of the policy alone that saves and resumes as the trainer does."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import torch

from gpg_megatron.batching.updates import make_batches
from gpg_megatron.checkpoint.resume import find_resume_point
from gpg_megatron.config.sections import Config
from gpg_megatron.host.collectives import on_rank0
from gpg_megatron.host.device import Device
from gpg_megatron.layout.hf_io import load_hf
from gpg_megatron.loop.checkpoints import RunCheckpoints, check_bytes, layout_of, saving_of
from gpg_megatron.loop.state import LoopState
from gpg_megatron.model.flops import token_costs
from gpg_megatron.model.shape import load_model_shape
from gpg_megatron.policy.policy import Policy
from gpg_megatron.types import TrainBatch
from tests.dist.problem import plan_of


class PolicyRun:
    """Collective over the ranks of an initialised world."""

    def __init__(self, config: Config, samples: list[Any], device: Device = "cpu") -> None:
        shape = load_model_shape(config.model.path)
        self.config = config
        self.policy = Policy(config, shape, device)
        self.saving = saving_of(config, shape)
        remembered = LoopState(values={}, groups=())
        self.checkpoints = RunCheckpoints(self.saving, on_rank0, lambda: remembered)
        point, self.warnings = on_rank0(lambda: find_resume_point(config, shape))
        self.step = 0
        if point is None:
            load_hf(config.model.path, self.policy.named_shards(), shape, self.policy.position)
            self.policy.weights_loaded()
        else:
            check_bytes(point.directory, point.marker)
            same = point.marker.layout == layout_of(config.policy)
            self.policy.resume(point.directory, version=point.marker.version, same_ranks=same)
            self.step = point.marker.step
        plan = plan_of(config, token_costs(shape), self.policy.position.dp_rank)
        self.batches = make_batches(samples, plan)

    def advance(self, to_step: int, note: Callable[[PolicyRun], None] | None = None) -> list[Any]:
        """Train and save up to a step; what each update said. note is called before a save."""
        results = []
        while self.step < to_step:
            self.step += 1
            results.append(self.policy.train(self.batch_of(self.step)))
            if note:
                note(self)
            self.checkpoints.save_at(self.step, self.policy, {})
        return results

    def batch_of(self, step: int) -> TrainBatch:
        live = [batch for batch in self.batches if batch.micro_batches]
        return live[step % len(live)]

    def state(self) -> dict[str, torch.Tensor]:
        """This rank's weights, moments, and random state."""
        found = {f"weight.{n}": t.clone() for n, t in self.policy.named_shards().items()}
        for i, chained in enumerate(self.policy._optimizer.chained_optimizers):
            for g, group in enumerate(chained.optimizer.param_groups):
                for p, parameter in enumerate(group["params"]):
                    for name, value in chained.optimizer.state[parameter].items():
                        key = f"moment.{i}.{g}.{p}.{name}"
                        found[key] = torch.as_tensor(value).detach().clone()
        found["rng"] = torch.get_rng_state()
        return found


def digest(state: Mapping[str, torch.Tensor]) -> str:
    """One number for all bytes of a state."""
    total = hashlib.sha256()
    for name in sorted(state):
        total.update(name.encode())
        total.update(state[name].reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
