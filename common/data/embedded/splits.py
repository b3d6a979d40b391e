"""The splits of the embedded benchmark: fixed sequences of random scenes, drawn and packed when first needed.

Nothing here needs Lightning, whose import takes longer than an evaluation of the small models.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from itertools import chain, islice
from pathlib import Path
from random import Random
from types import ModuleType

from rich.progress import track

from common.data.account import Account
from common.data.embedded import scenes, shapes, textures
from common.data.embedded.twemoji import PHRASES, VIEW, canvas_size
from common.data.packing import Entry, write_manifest, write_tar
from common.data.reader import count_samples
from common.data.tar import read_shard
from common.paths import runs_directory, written_whole

SPLITS = {
    1: {
        "train": (60_000, 1000),
        "val": (4000, 500),
        "test": (20_608, 500),  # 32 of each seen name
        "unseen": (4000, 500),
        "retrieval": (2000, 500),
    },
    2: {
        "train": (60_000, 1000),
        "val": (20_000, 500),
        "test": (20_000, 500),
        "unseen": (4000, 500),
        "retrieval": (2000, 500),
    },
    3: {"train": (20_000, 500), "val": (4000, 500), "test": (10_000, 500)},
}
"""(pictures, pictures per shard) of every split, by revision."""
CURRENT = 2
"""The revision that is drawn where none is named."""
_SCENES = {1: scenes, 2: shapes, 3: textures}


def scenes_of(revision: int) -> ModuleType:
    """The module that draws the scenes of a revision. ValueError: no such revision."""
    if revision not in _SCENES:
        raise ValueError(
            f"revision {revision}: the embedded benchmark has the revisions {', '.join(map(str, _SCENES))}"
        )
    return _SCENES[revision]


def _seed(split: str, revision: int) -> str:
    """What a split's randomness starts from: another string in every revision, so that its test pictures are unseen."""
    return split if revision == 1 else f"{split}, revision {revision}"


@cache
def _order(split: str, cycle: int, revision: int = CURRENT) -> list[int]:
    labels = list(_labels(split, revision))
    Random(f"{_seed(split, revision)}/order/{cycle}").shuffle(labels)
    return labels


def _labels(split: str, revision: int) -> range:
    seen, both = (len(scenes_of(revision).class_names(names)) for names in ("seen", "all"))
    return range(seen, both) if split == "unseen" else range(seen)


def scene(split: str, index: int, revision: int = CURRENT) -> tuple[scenes.Scene | shapes.Scene | textures.Scene, str]:
    """Picture ``index`` of a split and its caption; each cycle of pictures shows every name once."""
    rng, drawing = Random(f"{_seed(split, revision)}/{index}"), scenes_of(revision)
    labels = _labels(split, revision)
    cycle, place = divmod(index, len(labels))
    drawn = drawing.draw_scene(rng, _order(split, cycle, revision)[place], labels)
    return drawn, drawn.caption() if split == "retrieval" else drawn.caption(*drawing.draw_mentions(rng))


def indices(split: str, revision: int = CURRENT) -> list[int]:
    """The pictures of a split; "retrieval" leaves out those whose caption an earlier one has."""
    scenes_of(revision)
    splits = SPLITS[revision]
    if split not in splits:
        raise ValueError(f"the embedded benchmark has the splits {list(splits)}, not {split!r}")
    pictures = splits[split][0]
    if split != "retrieval":
        return list(range(pictures))
    first: dict[str, int] = {}
    index = 0
    while len(first) < pictures:
        first.setdefault(scene(split, index, revision)[1], index)
        index += 1
    return list(first.values())


def recipe_hash(view: int = VIEW, revision: int = CURRENT) -> str:
    """Names the packed data: equal exactly when recipe, pixels of the view, splits and names are."""
    drawing = scenes_of(revision)
    recipe = drawing.RECIPE | {"canvas": canvas_size(view)}
    text = json.dumps([recipe, SPLITS[revision], PHRASES, drawing.name_table()])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def sample(split: str, index: int, view: int = VIEW, revision: int = CURRENT) -> dict[str, str | bytes]:
    """Picture ``index`` of a split as its shard holds it: key, JPEG of the whole canvas, caption, and facts as JSON."""
    drawn, caption = scene(split, index, revision)
    jpeg, quality = io.BytesIO(), scenes_of(revision).RECIPE["quality"]
    drawn.render(view).save(jpeg, "JPEG", quality=quality, subsampling=0)
    facts = json.dumps(drawn.facts())
    key = f"{split}-{index:06d}"
    return {"__key__": key, "jpg": jpeg.getvalue(), "txt": caption.encode(), "json": facts.encode()}


def _write_shard(job: tuple[str, Path, list[int], int, int]) -> Entry:
    split, path, pictures, view, revision = job
    return write_tar(path, (sample(split, index, view, revision) for index in pictures))


def _folder(split: str, root: Path | None, view: int, revision: int) -> Path:
    return (root or runs_directory() / "data") / f"embedded-{recipe_hash(view, revision)}" / split


def pack(split: str, root: Path | None = None, view: int = VIEW, revision: int = CURRENT) -> Path:
    """The folder of a split's shards; a missing one is written first, complete or not at all.

    view: pixels at which the scenes are drawn, one of the revision's VIEWS.
    """
    folder = _folder(split, root, view, revision)
    if folder.exists():
        return folder
    pictures, per_shard = indices(split, revision), SPLITS[revision][split][1]
    parts = [pictures[start : start + per_shard] for start in range(0, len(pictures), per_shard)]
    try:
        with written_whole(folder) as unfinished:
            unfinished.mkdir()
            files = [unfinished / f"{number:03d}.tar" for number in range(len(parts))]
            jobs = [(split, file, part, view, revision) for file, part in zip(files, parts, strict=True)]
            with ProcessPoolExecutor() as pool:
                entries = list(track(pool.map(_write_shard, jobs), f"packing {split} ({len(pictures)})", len(jobs)))
            shards = {job[1].name: entry for job, entry in zip(jobs, entries, strict=True)}
            write_manifest(unfinished, shards, "Twemoji, CC-BY 4.0")
    except OSError:
        if not folder.exists():  # otherwise another process was faster, and its shards are equal
            raise
    return folder


def samples(split: str, count: int, view: int = VIEW, revision: int = CURRENT) -> Iterator[Mapping[str, str | bytes]]:
    """The first ``count`` pictures of a split, as ``sample`` gives them: read from its shards where it is packed."""
    folder = _folder(split, None, view, revision)
    if not folder.exists():
        return (sample(split, index, view, revision) for index in indices(split, revision)[:count])
    shards = count_samples([str(path) for path in sorted(folder.glob("*.tar"))])
    return islice(chain.from_iterable(read_shard(shard, Account(0.0)) for shard in shards), count)
