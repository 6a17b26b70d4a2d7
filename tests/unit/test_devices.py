"""Which GPUs ranks and engines have, by hand."""

from __future__ import annotations

import pytest

from gpg_megatron.errors import UserError
from gpg_megatron.placement.devices import engine_devices, visible_devices
from gpg_megatron.placement.states import Mode

EIGHT = tuple("01234567")


def test_names_come_from_the_variable_as_far_as_they_are_good() -> None:
    assert visible_devices(None, 3) == ("0", "1", "2")
    assert visible_devices("6, 4,GPU-8f", 3) == ("6", "4", "GPU-8f")
    assert visible_devices("2,3,99", 2) == ("2", "3")
    assert visible_devices("", 0) == visible_devices(None, 0) == ()


def test_colocated_engines_share_the_ranks_gpus() -> None:
    assert engine_devices(EIGHT, mode="colocated", n_ranks=8, n_workers=8) == EIGHT
    assert engine_devices(EIGHT, mode="colocated", n_ranks=8, n_workers=2) == ("0", "1")
    assert engine_devices(EIGHT, mode="colocated", n_ranks=1, n_workers=4) == EIGHT[:4]
    with pytest.raises(UserError, match=r"need 9 GPUs \(max of both\), 8 are visible"):
        engine_devices(EIGHT, mode="colocated", n_ranks=4, n_workers=9)
    with pytest.raises(UserError, match="16 policy ranks and 2 engine workers need 16 GPUs"):
        engine_devices(EIGHT, mode="colocated", n_ranks=16, n_workers=2)


def test_disaggregated_engines_have_the_gpus_after_the_ranks() -> None:
    mode: Mode = "disaggregated"
    assert engine_devices(EIGHT, mode=mode, n_ranks=4, n_workers=4) == ("4", "5", "6", "7")
    assert engine_devices(("7", "3", "5"), mode=mode, n_ranks=1, n_workers=1) == ("3",)
    with pytest.raises(UserError) as raised:
        engine_devices(EIGHT, mode=mode, n_ranks=8, n_workers=8)
    assert str(raised.value) == (
        "trainer.placement=disaggregated: 8 policy ranks and 8 engine workers need 16 GPUs (sum of "
        "both), 8 are visible; expected fewer ranks or workers, or colocated"
    )
