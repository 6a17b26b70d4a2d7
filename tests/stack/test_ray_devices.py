"""A private Ray gives engines the GPUs that it was told, and no others."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

from gpg_megatron.config.sections import RolloutConfig
from gpg_megatron.errors import UserError
from gpg_megatron.host.reaper import RUN_ID_VARIABLE, cleanup_run, new_run_id, scratch_directory
from gpg_megatron.rollout.engine import take_devices
from gpg_megatron.rollout.ray_session import has_ended, leave_ray, open_ray, raylets


@pytest.fixture
def run_id(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Of a run whose Ray is ended afterwards."""
    import ray

    run_id = new_run_id()
    monkeypatch.setenv(RUN_ID_VARIABLE, run_id)
    # What a rank on a machine with eight GPUs may see.
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,6,5,4")
    try:
        yield run_id
    finally:
        ray.shutdown()
        cleanup_run(run_id)


@pytest.mark.parametrize("untold", [False, True])
def test_engines_get_the_devices_that_they_were_given(
    run_id: str, untold: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray's own book-keeping, which needs no GPU to be there; also where the user's shell has told
    Ray not to set the variable."""
    import ray

    if untold:
        monkeypatch.setenv("RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES", "1")

    config = RolloutConfig(num_engines=2)
    scratch = scratch_directory(run_id)
    open_ray(config, run_id=run_id, scratch_dir=scratch, gpus_per_engine=1, devices=("5", "4"))
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "7,6,5,4", "the rank keeps its own"

    class Engine:
        def devices(self) -> str:
            take_devices()
            return os.environ["CUDA_VISIBLE_DEVICES"]

    actor = ray.remote(num_cpus=1, num_gpus=1)(Engine)
    engines: list[Any] = [actor.remote() for _ in range(2)]
    found = ray.get([engine.devices.remote() for engine in engines], timeout=120)
    assert sorted(found) == ["4", "5"]


def test_too_few_devices_are_told_and_a_ray_that_hangs_is_left(run_id: str) -> None:
    config = RolloutConfig(num_engines=2)
    scratch = scratch_directory(run_id)
    with pytest.raises(UserError, match="2 engines of 1 CPU and 2 GPUs on one node are asked for"):
        open_ray(config, run_id=run_id, scratch_dir=scratch, gpus_per_engine=2, devices=("5", "4"))
    (raylet,) = raylets()
    raylet.suspend()  # Ray would wait for its answer for ever
    leave_ray(2.0)
    assert has_ended(raylet)
