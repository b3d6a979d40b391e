"""Whether shards are as complete as their manifest, or the number that a recipe states, says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from common.data.reader import entry_of, manifests
from common.data.tar import count_headers, is_remote

SOME = 4  # shards whose headers stand for all


def compare_sizes(urls: Sequence[str]) -> None:
    """ValueError: local shards whose size is not the one in the manifest beside them."""
    known = manifests(urls)
    wrong = []
    for url in urls:
        entry = entry_of(url, known)
        size = Path(url).stat().st_size if entry else 0
        if entry and size != entry.get("bytes", size):
            wrong.append(f"{url} has {size} bytes, its manifest.json says {entry['bytes']}")
    if wrong:
        raise ValueError(
            f"{len(wrong)} of {len(urls)} shards were cut or changed after they were packed, first {wrong[0]}; copy "
            "them again, or remove manifest.json and pack or verify them again"
        )


def compare_with_headers(urls: Sequence[str], samples: int | None) -> None:
    """Compare a stated number of samples with an estimate from the headers of some local shards.

    ValueError: one is more than twice the other, or the shards hold nothing that can be read.
    """
    if samples is None or not urls or any(is_remote(url) for url in urls):
        return
    sizes = {url: Path(url).stat().st_size for url in urls}
    some = list(urls)[:: -(-len(urls) // SOME)]
    share = sum(sizes[url] for url in some) / max(1, sum(sizes.values()))
    about = round(sum(map(count_headers, some)) / share) if share else 0
    if not about:
        raise ValueError(
            f"no sample can be read in {len(some)} of {len(urls)} shards, first {some[0]}; fetch them again"
        )
    if not about / 2 <= samples <= 2 * about:
        raise ValueError(
            f"train_num_samples is {samples}, but the {len(urls)} shards hold about {about} samples (by the headers of "
            f"{len(some)}); give --data.train_num_samples {about}, or null to count all"
        )
