"""The account of a data source: how many samples were delivered, rejected or ignored, and for which reasons.

One ``Account`` goes from the reader to the result: readers fill it, commands print it, result files hold it.
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

_log = logging.getLogger(__name__)
_GRACE = 1000  # the fraction of rejected samples is compared with the limit after this many, and at the end of a pass

REASONS = (
    "no picture",
    "no caption",
    "unusable caption",
    "unusable picture",
    "unusable label",
    "repeated key",
    "damaged shard",
    "missing from its shard",
    "unusable sample",
)
"""The reasons for which a sample is rejected."""
IGNORED = ("system file", "kind that is not read", "link in a tar", "folder seen before", "caption without a picture")
"""The reasons for which a file is ignored: it is no sample of its own."""


class Unusable(ValueError):
    """A sample cannot be used. reason: one of REASONS."""

    def __init__(self, reason: str, detail: object = "") -> None:
        super().__init__(str(detail) or reason)
        self.reason = reason


@dataclass
class Account:
    """Counts of samples: delivered, rejected by reason; and of files that are no samples, ignored by reason.

    limit: the largest fraction of rejected samples; None: any.  examples: the first item of each reason.
    last: the last rejection.  seen: the samples taken from shards, also those that are not decoded yet.
    kinds: the ignored files of a folder by their kind, such as ".heic".
    """

    limit: float | None = None
    delivered: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    ignored: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    last: str = ""
    seen: int = 0
    kinds: Counter[str] = field(default_factory=Counter)

    @property
    def bad(self) -> int:
        """The number of rejected samples."""
        return sum(self.rejected.values())

    @property
    def read(self) -> int:
        """The number of all samples, delivered and rejected."""
        return self.delivered + self.bad

    def reject(self, where: str, error: Exception | str, samples: int = 1) -> None:
        """Count and log rejected samples at ``where`` (a key or a shard). ValueError: more than the limit allows."""
        reason = getattr(error, "reason", "unusable sample")
        self.rejected[reason] += samples
        self.last = f"{where}: {error}"
        self.examples.setdefault(reason, str(where))
        if self.bad <= 10 or self.bad % 1000 == 0:
            _log.warning("skipped %s (%d so far)", self.last, self.bad)
        self.check(_GRACE)

    def ignore(self, reason: str, name: object, kind: str | None = None) -> None:
        """Count a file that is no sample. kind: of one that is not read."""
        self.ignored[reason] += 1
        self.kinds.update([kind] if kind else [])
        self.examples.setdefault(reason, str(name))

    def check(self, at_least: int = 1) -> None:
        """ValueError: the rejected fraction of the samples read (counted as ``at_least`` or more) exceeds the limit."""
        seen = max(self.read, self.seen)
        if self.limit is not None and self.bad > self.limit * max(seen, at_least):
            raise ValueError(
                f"{self.bad} of {seen} samples are damaged, above max_damaged={self.limit}; "
                f"last {self.last}; write the shards again, or raise max_damaged"
            )

    def add(self, other: Account) -> None:
        """Add the counts of another account."""
        self.delivered += other.delivered
        self.seen += other.seen
        self.rejected += other.rejected
        self.ignored += other.ignored
        self.kinds += other.kinds
        self.last = other.last or self.last
        self.examples = other.examples | self.examples

    def to_dict(self) -> dict[str, Any]:
        """The counts as plain values, for result files."""
        rejected, ignored = dict(sorted(self.rejected.items())), dict(sorted(self.ignored.items()))
        return {"read": self.read, "delivered": self.delivered, "rejected": rejected, "ignored": ignored}

    def counts(self) -> list[int]:
        """The counts as numbers: delivered, then each of REASONS, then each of IGNORED."""
        return [self.delivered, *(self.rejected[r] for r in REASONS), *(self.ignored[r] for r in IGNORED)]

    @classmethod
    def from_counts(cls, counts: list[int]) -> Account:
        """The account with these ``counts()``."""
        delivered, *rest = counts
        rejected = Counter(dict(zip(REASONS, rest[: len(REASONS)], strict=True)))
        return cls(None, delivered, +rejected, +Counter(dict(zip(IGNORED, rest[len(REASONS) :], strict=True))))

    def __str__(self) -> str:
        """One line, such as "samples: 9 read, 8 delivered, 1 rejected (1 no caption, first s0-3)"."""
        samples = f"{self.read:,} read, {self.delivered:,} delivered, {self.bad:,} rejected"
        return f"samples: {samples}{self._list(self.rejected)}{self.ignored_files()}"

    def ignored_files(self) -> str:
        """The end of the line, empty where no file was ignored."""
        total = sum(self.ignored.values())
        return f", {total:,} files ignored{self._list(self.ignored)}" if total else ""

    def _list(self, counts: Counter[str]) -> str:
        first = {reason: f", first {self.examples[reason]}" if reason in self.examples else "" for reason in counts}
        text = "; ".join(f"{count:,} {reason}{first[reason]}" for reason, count in sorted(counts.items()))
        printable = text.encode(errors="backslashreplace").decode()  # a file's name may be no valid Unicode
        return f" ({printable})" if text else ""
