"""What is looked at before anything of a run starts."""

from __future__ import annotations

from gpg_megatron.checkpoint.resume import find_resume_point
from gpg_megatron.config.sections import Config
from gpg_megatron.errors import UserError
from gpg_megatron.loop.inputs import check_model, check_output, load_inputs


def check_devices(n_ranks: int) -> None:
    """A rank takes the device of its local number. Raises UserError."""
    import torch

    if (count := torch.cuda.device_count()) < n_ranks:
        raise UserError(
            f"this host is to run {n_ranks} policy ranks, and torch sees {count} CUDA devices; "
            "expected one for each (in a SLURM job: one task on each node, with all of its GPUs)"
        )


def has_work(config: Config) -> bool:
    """All checks; False and a line when the run has come to its end already. Raises UserError."""
    check_output(config)
    shape = check_model(config)
    load_inputs(config)
    point, _ = find_resume_point(config, shape)
    total = config.trainer.total_training_steps
    if point is None or point.marker.step < total:
        return True
    print(f"nothing to do: {point.directory} has trainer.total_training_steps={total} behind it")
    return False
