"""How many files a process of this run may have open."""

from __future__ import annotations

import resource

from gpg_megatron.errors import UserError

WANTED = 65_536
NEEDED = 512
"""By Ray's daemons and one engine of the demo, with some room."""


def allow_open_files() -> None:
    """Raise this process's own limit as far as it may, for itself and what it starts.

    Raises:
        UserError: that is too few.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = WANTED if hard == resource.RLIM_INFINITY else min(hard, WANTED)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        soft = most
    if soft != resource.RLIM_INFINITY and soft < NEEDED:
        raise UserError(
            f"this host allows a process {soft} open files (ulimit -Hn); expected at least "
            f"{NEEDED}, and thousands with many engines"
        )
