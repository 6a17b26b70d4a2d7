"""Many small copies in few launches."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def copy_all(targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
    """targets[i].copy_(sources[i]); no two targets overlap.

    On a GPU torch copies a whole list in one kernel as long as all of it is contiguous; strided
    pairs, which are columns, take one each.
    """
    plain: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    strided: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    for target, source in zip(targets, sources, strict=True):
        kind = plain if target.is_contiguous() and source.is_contiguous() else strided
        kind[0].append(target)
        kind[1].append(source)
    for these, those in (plain, strided):
        if these:
            torch._foreach_copy_(these, those)
