"""The embedded benchmark: Twemoji pictures with captions, a real image-text data set that needs pip alone.

Its splits are fixed sequences of random scenes, drawn and packed into shards when they are first asked for, and read by
the same loader as any other shards. Revision 1 (``scenes``) shows emoji in their own colours, from which most names
follow; revision 2 (``shapes``) shows them in random ones. Committed weights and results are revision 1's.

Labels number the names of a revision's ``class_names("all")``: first the seen ones, then the held-out ones.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from itertools import chain, islice
from pathlib import Path
from random import Random
from types import ModuleType

from rich.progress import track

from common.data.account import Account
from common.data.augmentations import Augmentation, after
from common.data.embedded import scenes, shapes
from common.data.embedded.scenes import ATTRIBUTION, VIEWS, class_names
from common.data.embedded.twemoji import PHRASES, TEMPLATES, VIEW, canvas_size, prompt
from common.data.packing import Entry, write_manifest, write_tar
from common.data.reader import count_samples
from common.data.shards import ShardDataModule
from common.data.tar import read_shard
from common.data.transforms import Transform, center_view, random_view
from common.paths import runs_directory, written_whole

__all__ = [  # the names in capitals and ``class_names`` are revision 1's
    "ATTRIBUTION",
    "SPLITS",
    "TEMPLATES",
    "VIEW",
    "VIEWS",
    "EmbeddedDataModule",
    "class_names",
    "indices",
    "pack",
    "prompt",
    "recipe_hash",
    "sample",
    "samples",
    "scene",
    "scenes_of",
]

SHIFT = 3.0
"""How far the training crop moves, in pixels of a view of 48."""
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
}
"""(pictures, pictures per shard) of every split, by revision."""
_SCENES = {1: scenes, 2: shapes}


def scenes_of(revision: int) -> ModuleType:
    """The module that draws the scenes of a revision. ValueError: no such revision."""
    if revision not in _SCENES:
        raise ValueError(
            f"revision {revision}: the embedded benchmark has the revisions {' and '.join(map(str, _SCENES))}"
        )
    return _SCENES[revision]


def _seed(split: str, revision: int) -> str:
    """What a split's randomness starts from: another string in every revision, so that its test pictures are unseen."""
    return split if revision == 1 else f"{split}, revision {revision}"


@cache
def _order(split: str, cycle: int, revision: int = 1) -> list[int]:
    labels = list(_labels(split, revision))
    Random(f"{_seed(split, revision)}/order/{cycle}").shuffle(labels)
    return labels


def _labels(split: str, revision: int) -> range:
    seen, both = (len(scenes_of(revision).class_names(names)) for names in ("seen", "all"))
    return range(seen, both) if split == "unseen" else range(seen)


def scene(split: str, index: int, revision: int = 1) -> tuple[scenes.Scene | shapes.Scene, str]:
    """Picture ``index`` of a split and its caption; each cycle of pictures shows every name once."""
    rng, drawing = Random(f"{_seed(split, revision)}/{index}"), scenes_of(revision)
    labels = _labels(split, revision)
    cycle, place = divmod(index, len(labels))
    drawn = drawing.draw_scene(rng, _order(split, cycle, revision)[place], labels)
    return drawn, drawn.caption() if split == "retrieval" else drawn.caption(*drawing.draw_mentions(rng))


def indices(split: str, revision: int = 1) -> list[int]:
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


def recipe_hash(view: int = VIEW, revision: int = 1) -> str:
    """Names the packed data: equal exactly when recipe, pixels of the view, splits and names are."""
    drawing = scenes_of(revision)
    recipe = drawing.RECIPE | {"canvas": canvas_size(view)}
    text = json.dumps([recipe, SPLITS[revision], PHRASES, drawing.name_table()])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def sample(split: str, index: int, view: int = VIEW, revision: int = 1) -> dict[str, str | bytes]:
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


def pack(split: str, root: Path | None = None, view: int = VIEW, revision: int = 1) -> Path:
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


def samples(split: str, count: int, view: int = VIEW, revision: int = 1) -> Iterator[Mapping[str, str | bytes]]:
    """The first ``count`` pictures of a split, as ``sample`` gives them: read from its shards where it is packed."""
    folder = _folder(split, None, view, revision)
    if not folder.exists():
        return (sample(split, index, view, revision) for index in indices(split, revision)[:count])
    shards = count_samples([str(path) for path in sorted(folder.glob("*.tar"))])
    return islice(chain.from_iterable(read_shard(shard, Account(0.0)) for shard in shards), count)


class EmbeddedDataModule(ShardDataModule):
    """The embedded benchmark's splits train, val, test, unseen and retrieval; packed when first asked for.

    Args:
        architecture: open_clip model name or ``.json`` file, for picture size, context length and vocabulary.
        batch_size: Pairs per batch on each device.
        num_workers: Worker processes per device; 0 reads in the training process.
        seed: Start of the loader's randomness (the stored pictures never change).
        max_damaged: Fraction of damaged samples that is tolerated.
        root: Folder for the packed shards; default: ``data`` in $EFFCLIP_RUNS.
        captions: Whether batches have captions; False saves their encoding where labels are enough.
        image_size: 48 or 96 (revision 2 also: 24), the pixels at which the scenes are drawn and given. Default: drawn
            at 48 and resized to the architecture's size. ValueError: another size.
        train_fraction: Share of the training shards that is read, the first ones.
        augment: Whether training pictures are random views; False shows their centre, as evaluation does.
        image_views, text_view: as in ``ShardDataModule``; further views are drawn from random views.
        revision: 1 or 2, see above; the architecture's vocabulary must be that of its names. ValueError: another one.
    """

    def __init__(
        self,
        architecture: str = "common/embedded_clip.json",
        batch_size: int = 128,
        num_workers: int = 1,
        seed: int = 0,
        max_damaged: float = 0.0,
        root: str | None = None,
        captions: bool = True,
        image_size: int | None = None,
        train_fraction: float = 1.0,
        augment: bool = True,
        revision: int = 1,
        image_views: Sequence[str] = (),
        text_view: str | None = None,
    ) -> None:
        views = scenes_of(revision).VIEWS
        if image_size not in (None, *views):
            raise ValueError(f"image_size {image_size}: the embedded pictures are drawn at one of {views} pixels")
        super().__init__(
            architecture=architecture,
            image_size=image_size,
            batch_size=batch_size,
            num_workers=num_workers,
            seed=seed,
            shuffle_buffer=4000,
            max_damaged=max_damaged,
            train_fraction=train_fraction,
            captions=captions,
            augment=augment,
            image_views=image_views,
            text_view=text_view,
        )
        self.root = Path(root) if root else None
        self.view, self.revision = image_size or VIEW, revision
        self.attribution = scenes_of(revision).ATTRIBUTION

    def prepare_data(self) -> None:
        """Pack what the trainer is about to read."""
        task = self.trainer.state.fn.value if self.trainer else "fit"
        for split in {"fit": ("train", "val"), "validate": ("val",)}.get(task, ("test",)):
            pack(split, self.root, self.view, self.revision)

    @property
    def splits(self) -> list[str]:
        """All splits; each is packed when its shards are asked for."""
        return list(SPLITS[self.revision])

    def shard_urls(self, split: str) -> list[str]:
        """Paths of a split's shards, packed now where they are missing. ValueError: no such split."""
        folder = pack(split, self.root, self.view, self.revision)
        return self.part(split, [str(path) for path in sorted(folder.glob("*.tar"))])

    templates, scale = TEMPLATES, "embedded"

    @property
    def class_names(self) -> list[str]:
        """The seen names, in the order of the labels."""
        return scenes_of(self.revision).class_names("seen")

    @property
    def class_prompts(self) -> list[str]:
        """The caption of each seen class, in the order of the labels: what zero-shot validation classifies by."""
        return [prompt(name) for name in self.class_names]

    def picture_transform(self, train: bool) -> Transform:
        """Random view of the stored canvas for training, its centre otherwise."""
        sizes = {"image_size": self.image_size, "view": self.view}
        return partial(random_view, **sizes, shift=SHIFT * self.view / VIEW) if train else partial(center_view, **sizes)

    def view_transform(self, view: Augmentation) -> Transform:
        """A further view: the augmentation of a random view."""
        return after(self.picture_transform(train=True), view.transform(self.image_size))
