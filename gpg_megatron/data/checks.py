"""What is worth knowing about a data set before it is trained on.

Nothing is removed here: benchmarks are used as they were published, and what is odd is said.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

from gpg_megatron.config.reward import RewardConfig
from gpg_megatron.data.catalog import Loaded
from gpg_megatron.reward import sources

SHOWN = 5
"""Findings of each kind that are printed; the file holds all of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """The result of examine."""

    counts: Mapping[str, int]
    """Split -> rows."""
    unusable: tuple[tuple[str, str], ...]
    """(location, reason) of records that no row could be made of."""
    duplicates: tuple[tuple[str, ...], ...]
    """Rows of one split that ask the same, each as "<split>/<index>"."""
    conflicts: tuple[tuple[str, ...], ...]
    """The duplicates whose reference answers differ."""
    overlap: tuple[tuple[str, ...], ...]
    """(train row, test row, ...) that ask the same."""
    unmet: tuple[tuple[str, str], ...]
    """(row, reason) of reference answers that score 0 against themselves."""

    def to_json(self) -> dict[str, Any]:
        """For the file."""
        unusable = [{"location": where, "reason": why} for where, why in self.unusable]
        unmet = [{"row": row, "reason": reason} for row, reason in self.unmet]
        return {**asdict(self), "unusable": unusable, "unmet": unmet}

    def lines(self) -> list[str]:
        """For the person who runs the command; empty when there is nothing to say."""
        unusable = [f"{where}: {why}" for where, why in self.unusable]
        result = _listed("records without a usable answer were left out", unusable)
        for what, groups in (
            ("problems stand more than once in a split", self.duplicates),
            ("of these have different reference answers", self.conflicts),
            ("problems stand in train and in test", self.overlap),
        ):
            result += _listed(what, [" = ".join(rows) for rows in groups])
        unmet = [f"{row}: ground truth {reason}" for row, reason in self.unmet]
        return result + _listed("reference answers can be met by no answer", unmet)


def examine(splits: Mapping[str, Loaded]) -> Findings:
    """Look for double problems, in one split and across, by their text without regard to
    letter case and white space; and for answers that no answer can meet."""
    rows: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    truths: dict[str, str] = {}
    for split, loaded in splits.items():
        for row in loaded.rows:
            name = f"{split}/{row['extra_info']['index']}"
            rows[_key(row)][split].append(name)
            truths[name] = row["reward_model"]["ground_truth"]
    duplicates = [tuple(x) for by_split in rows.values() for x in by_split.values() if len(x) > 1]
    config = RewardConfig()
    unmet = (
        (f"{split}/{row['extra_info']['index']}", reason)
        for split, loaded in splits.items()
        for row in loaded.rows
        if (
            reason := sources.unmet(
                sources.scorer_name(row["data_source"], config), row["reward_model"]["ground_truth"]
            )
        )
    )
    return Findings(
        counts={split: len(loaded.rows) for split, loaded in splits.items()},
        unusable=tuple(record for loaded in splits.values() for record in loaded.unusable),
        duplicates=tuple(duplicates),
        conflicts=tuple(x for x in duplicates if len({truths[name] for name in x}) > 1),
        unmet=tuple(unmet),
        overlap=tuple(tuple(chain(*x.values())) for x in rows.values() if len(x) > 1),
    )


def _key(row: Mapping[str, Any]) -> str:
    return " ".join(str(row["extra_info"]["question"]).split()).casefold()


def _listed(what: str, items: Sequence[str]) -> list[str]:
    if not items:
        return []
    more = [f"  ... and {len(items) - SHOWN} more"] if len(items) > SHOWN else []
    return [f"{len(items)} {what}:", *(f"  {item}" for item in items[:SHOWN]), *more]
