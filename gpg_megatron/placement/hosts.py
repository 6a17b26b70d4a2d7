"""Which policy ranks and which engines each of several hosts has. Pure arithmetic.

disaggregated on GPUs    the first hosts are filled with ranks, the GPUs that are left are the
                         engines': a later host may have engines only
colocated, or on CPU     ranks and engines are shared evenly

Tensor-parallel groups are consecutive ranks; one straddles hosts only where it must.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gpg_megatron.errors import UserError
from gpg_megatron.placement.devices import first_engine_device
from gpg_megatron.placement.states import Mode


@dataclass(frozen=True, slots=True, kw_only=True)
class HostOffer:
    """What a host says of itself."""

    n_gpus: int | None
    """None: the run is on CPU."""
    n_ranks: int | None
    """As many ranks it is to have; None: as they are shared."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HostShare:
    """What a host has of a run."""

    n_ranks: int
    """Rank r of the host has its GPU r."""
    n_engines: int
    first_device: int
    """Index of the first GPU of its engines."""
    n_devices: int
    """GPUs of its engines; 0 on CPU."""


def share_hosts(
    offers: Sequence[HostOffer],
    *,
    mode: Mode,
    world_size: int,
    group_size: int,
    n_engines: int,
    workers_per_engine: int,
) -> tuple[HostShare, ...]:
    """[host]; every host computes the same.

    Args:
        world_size: policy ranks of the run.
        group_size: of a tensor-parallel group.
        workers_per_engine: GPUs of an engine, all on one host.

    Raises:
        UserError: a host is to have more ranks than GPUs, or the hosts are too few or too many.
    """
    gpus = [offer.n_gpus for offer in offers]
    ranks = _ranks(offers, world_size, group_size, even=mode == "colocated" or None in gpus)
    first = [first_engine_device(mode, n) for n in ranks]
    rooms = [
        n_engines if n is None else max(0, n - begin) // workers_per_engine
        for n, begin in zip(gpus, first, strict=True)
    ]
    engines = _dealt(n_engines, rooms)
    if sum(engines) < n_engines:
        raise UserError(
            f"trainer.placement={mode}: {n_engines} engines of {workers_per_engine} GPUs on one "
            f"host are asked for, room for {sum(engines)} beside {world_size} policy ranks on "
            f"hosts with {_listed(gpus)} GPUs; expected fewer engines or more hosts"
        )
    return tuple(
        HostShare(
            n_ranks=ranks[k],
            n_engines=engines[k],
            first_device=first[k],
            n_devices=0 if gpus[k] is None else engines[k] * workers_per_engine,
        )
        for k in range(len(offers))
    )


def _ranks(
    offers: Sequence[HostOffer], world_size: int, group_size: int, *, even: bool
) -> list[int]:
    """[host] policy ranks."""
    for host, offer in enumerate(offers):
        n_gpus, n_ranks = offer.n_gpus, offer.n_ranks
        if n_gpus is not None and n_ranks is not None and n_ranks > n_gpus:
            raise UserError(
                f"host {host} is to run {n_ranks} policy ranks, and torch sees {n_gpus} CUDA "
                f"devices there; expected one for each"
            )
    left = world_size - sum(offer.n_ranks or 0 for offer in offers)
    free = [k for k, offer in enumerate(offers) if offer.n_ranks is None]
    rooms = [left if (n := offers[k].n_gpus) is None else n for k in free]
    for unit in (group_size, 1):
        in_units = [room // unit for room in rooms]
        dealt = _dealt(left // unit, in_units) if even else _filled(left // unit, in_units)
        if left % unit == 0 and sum(dealt) * unit == left:
            break
    else:
        raise UserError(
            f"the {world_size} policy ranks (TP x CP x PP x DP) do not fit on hosts with "
            f"{_listed([offer.n_gpus for offer in offers])} GPUs, of which "
            f"{_listed([offer.n_ranks for offer in offers])} are asked for by --nproc-per-node; "
            "expected one GPU for each rank"
        )
    ranks = [offer.n_ranks or 0 for offer in offers]
    for host, n in zip(free, dealt, strict=True):
        ranks[host] = n * unit
    if not ranks[0]:
        raise UserError("host 0 has no policy rank; expected at least one: it leads the run")
    return ranks


def _filled(total: int, rooms: Sequence[int]) -> list[int]:
    """As much as there is room for, in order."""
    found = []
    for room in rooms:
        found.append(min(room, max(0, total)))
        total -= found[-1]
    return found


def _dealt(total: int, rooms: Sequence[int]) -> list[int]:
    """One to each in turn, as long as there is room."""
    found = [0] * len(rooms)
    while total > 0 and any(n < room for n, room in zip(found, rooms, strict=True)):
        for k, room in enumerate(rooms):
            if found[k] < room and total > 0:
                found[k] += 1
                total -= 1
    return found


def _listed(numbers: Sequence[int | None]) -> str:
    return ", ".join("any" if n is None else str(n) for n in numbers)
