"""Which GPUs of a host the policy ranks have, and which the engines. Pure arithmetic.

colocated       rank r on GPU r, engine workers from GPU 0 on
disaggregated   rank r on GPU r, engine workers on the GPUs after the ranks'
"""

from __future__ import annotations

from collections.abc import Sequence

from gpg_megatron.errors import UserError
from gpg_megatron.placement.states import Mode


def first_engine_device(mode: Mode, n_ranks: int) -> int:
    """Index of the first GPU that an engine worker has, with n_ranks policy ranks on the host."""
    return 0 if mode == "colocated" else n_ranks


def visible_devices(variable: str | None, count: int) -> tuple[str, ...]:
    """Names of the GPUs that this process sees, in its order.

    Args:
        variable: CUDA_VISIBLE_DEVICES; None: it is not set.
        count: how many torch sees: fewer than named when one of the names is wrong.
    """
    if variable is None:
        return tuple(map(str, range(count)))
    return tuple(name.strip() for name in variable.split(","))[:count]


def engine_devices(
    visible: Sequence[str],
    *,
    mode: Mode,
    n_ranks: int,
    n_workers: int,
) -> tuple[str, ...]:
    """The GPUs of the engine workers.

    Args:
        visible: the host's GPUs, by their names.
        n_ranks: policy ranks on this host; rank r uses visible[r].
        n_workers: of all engines together, all on this host.

    Raises:
        UserError: there are too few.
    """
    first = first_engine_device(mode, n_ranks)
    needed = max(n_ranks, first + n_workers)
    if needed > len(visible):
        together = "max of both" if mode == "colocated" else "sum of both"
        raise UserError(
            f"trainer.placement={mode}: {n_ranks} policy ranks and {n_workers} engine workers "
            f"need {needed} GPUs ({together}), {len(visible)} are visible; expected fewer ranks "
            f"or workers" + (", or colocated" if mode == "disaggregated" else "")
        )
    return tuple(visible[first : first + n_workers])
