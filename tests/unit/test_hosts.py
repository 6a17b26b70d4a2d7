"""Which ranks and engines each host has, by hand and by property; and what Ray is told."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from gpg_megatron.config.loading import load_config
from gpg_megatron.errors import UserError
from gpg_megatron.placement.hosts import HostOffer, HostShare, share_hosts
from gpg_megatron.placement.states import Mode
from gpg_megatron.rollout.ray_host import start_ray_host

ROOT = Path(__file__).resolve().parents[2]


def shares(
    *gpus: int | None, asked: tuple[int | None, ...] = (), mode: Mode = "disaggregated",
    ranks: int, group: int = 1, engines: int = 1, workers: int = 1,
) -> list[tuple[int, int]]:  # fmt: skip
    """[host] (ranks, engines)."""
    wanted = asked or (None,) * len(gpus)
    offers = [HostOffer(n_gpus=n, n_ranks=r) for n, r in zip(gpus, wanted, strict=True)]
    found = share_hosts(
        offers, mode=mode, world_size=ranks, group_size=group, n_engines=engines,
        workers_per_engine=workers,
    )  # fmt: skip
    for n, share in zip(gpus, found, strict=True):
        assert share.n_devices == (0 if n is None else share.n_engines * workers)
    return [(share.n_ranks, share.n_engines) for share in found]


def test_the_72b_configuration_has_hosts_of_ranks_and_hosts_of_engines() -> None:
    config = load_config(ROOT / "configs" / "qwen2.5-72b_math_megatron.yaml")
    found = share_hosts(
        [HostOffer(n_gpus=8, n_ranks=None)] * 8,
        mode=config.trainer.placement,
        world_size=config.policy.world_size,
        group_size=config.policy.tensor_model_parallel_size,
        n_engines=config.rollout.num_engines,
        workers_per_engine=config.rollout.tensor_model_parallel_size,
    )
    ranks = HostShare(n_ranks=8, n_engines=0, first_device=8, n_devices=0)
    engines = HostShare(n_ranks=0, n_engines=1, first_device=0, n_devices=8)
    assert found == (ranks,) * 4 + (engines,) * 4


def test_groups_stay_on_one_host_where_they_can() -> None:
    assert shares(8, 8, ranks=12, group=4, engines=1, workers=4) == [(8, 0), (4, 1)]
    assert shares(6, 6, ranks=8, group=4, engines=2, workers=2) == [(4, 1), (4, 1)]
    assert shares(6, 6, ranks=9, group=3, engines=1, workers=3) == [(6, 0), (3, 1)]
    assert shares(8, 8, 8, ranks=16, group=16, engines=1, workers=8) == [(8, 0), (8, 0), (0, 1)]
    assert shares(6, 6, 6, ranks=16, group=4, engines=1) == [(6, 0), (6, 0), (4, 1)], "no other way"


def test_colocated_ranks_and_engines_are_shared_evenly() -> None:
    even: dict[str, Any] = {"mode": "colocated", "workers": 2}
    assert shares(8, 8, ranks=16, group=2, engines=8, **even) == [(8, 4), (8, 4)]
    assert shares(8, 8, ranks=8, group=2, engines=4, **even) == [(4, 2), (4, 2)]
    assert shares(8, 8, ranks=12, group=4, engines=3, **even) == [(8, 2), (4, 1)]
    assert shares(8, 4, ranks=12, group=4, engines=6, **even) == [(8, 4), (4, 2)]


def test_on_cpu_both_are_shared_evenly() -> None:
    assert shares(None, None, ranks=4, group=2, engines=2) == [(2, 1), (2, 1)]
    assert shares(None, None, ranks=4, group=1, engines=3) == [(2, 2), (2, 1)]
    assert shares(None, None, None, ranks=4, group=2, engines=1) == [(2, 1), (2, 0), (0, 0)]


def test_what_is_asked_for_is_given_and_the_others_share_the_rest() -> None:
    assert shares(None, None, asked=(4, 0), ranks=4, engines=2) == [(4, 1), (0, 1)]
    assert shares(8, 8, 8, asked=(4, None, 4), ranks=16, group=4) == [(4, 1), (8, 0), (4, 0)]
    assert shares(8, 8, asked=(4, None), ranks=8, group=2, engines=8) == [(4, 4), (4, 4)]


@pytest.mark.parametrize(
    ("gpus", "arguments", "message"),
    [
        ((8, 8), {"ranks": 4, "asked": (9, None)}, "host 0 is to run 9 policy ranks, and torch"),
        ((8, 0), {"ranks": 4, "asked": (2, 2)}, "host 1 is to run 2 policy ranks, .* sees 0 CUDA"),
        ((8, 8), {"ranks": 17}, "17 policy ranks .* do not fit on hosts with 8, 8 GPUs"),
        ((8, 8), {"ranks": 6, "asked": (4, 4)}, "of which 4, 4 are asked for"),
        ((8, 8), {"ranks": 8, "asked": (0, 8)}, "host 0 has no policy rank"),
        (
            (8, 8),
            {"ranks": 12, "engines": 2, "workers": 4},
            "2 engines of 4 GPUs on one host are asked for, room for 1 beside 12 policy ranks on "
            "hosts with 8, 8 GPUs; expected fewer engines or more hosts",
        ),
    ],
)
def test_what_does_not_fit_is_said(
    gpus: tuple[int, ...], arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        shares(*gpus, **arguments)


@given(
    gpus=st.lists(st.integers(1, 8), min_size=1, max_size=5),
    groups=st.integers(1, 6),
    group=st.sampled_from([1, 2, 4, 8]),
    engines=st.integers(1, 6),
    workers=st.sampled_from([1, 2, 4]),
    mode=st.sampled_from(["colocated", "disaggregated"]),
)
def test_no_gpu_is_given_twice_and_none_is_invented(
    gpus: list[int], groups: int, group: int, engines: int, workers: int, mode: Mode
) -> None:
    try:
        found = share_hosts(
            [HostOffer(n_gpus=n, n_ranks=None) for n in gpus], mode=mode,
            world_size=groups * group, group_size=group, n_engines=engines,
            workers_per_engine=workers,
        )  # fmt: skip
    except UserError:
        assume(False)
    assert sum(share.n_ranks for share in found) == groups * group
    assert sum(share.n_engines for share in found) == engines
    for n, share in zip(gpus, found, strict=True):
        assert share.n_ranks <= n
        assert share.first_device + share.n_devices <= max(n, share.first_device)
        if mode == "disaggregated":
            assert share.n_devices <= n - share.n_ranks and share.first_device == share.n_ranks
    if sum(n // group for n in gpus) >= groups:
        assert all(share.n_ranks % group == 0 for share in found), "nothing straddles"


def test_ray_is_told_of_the_engines_gpus_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Without --num-gpus and with all of them visible, Ray would give the ranks' GPUs away."""
    started: list[tuple[list[str], dict[str, str]]] = []

    def run(command: list[str], *, env: dict[str, str], **_: object) -> Any:
        started.append((command, env))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4,5,6,7")
    for devices, places in ((("4", "5", "6", "7"), 2), ((), 0)):
        start_ray_host(
            cluster="h:1", is_head=False, own_address="h", client_port=1, scratch_dir=tmp_path,
            engine_places=places, devices=devices,
        )  # fmt: skip
        command, environment = started[-1]
        assert command[command.index("--num-gpus") + 1] == str(len(devices))
        assert command[command.index("--num-cpus") + 1] == str(places)
        assert environment["CUDA_VISIBLE_DEVICES"] == ",".join(devices)
