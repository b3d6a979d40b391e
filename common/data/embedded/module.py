"""The embedded benchmark: Twemoji pictures with captions, a real image-text data set that needs pip alone.

Its splits are fixed sequences of random scenes, drawn and packed into shards when they are first asked for, and read by
the same loader as any other shards. Revision 1 (``scenes``) shows emoji in their own colours, from which most names
follow; revision 2 (``shapes``) shows them in random ones; in revision 3 (``textures``) the class is the fill of a
silhouette. The commands' ``--data embedded`` and the packaged model are revision 2's, as are WAVECLIP's and Patch
Ranking's tables and figures; the committed weights and results of MLIP are still revision 1's.

Labels number the names of a revision's ``class_names("all")``: first the seen ones, then the held-out ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from common.data.augmentations import Augmentation, after, sometimes_grey
from common.data.embedded.splits import CURRENT, SPLITS, indices, pack, recipe_hash, sample, samples, scene, scenes_of
from common.data.embedded.twemoji import TEMPLATES, VIEW, prompt
from common.data.shards import ShardDataModule
from common.data.transforms import Transform, center_view, random_view

__all__ = [
    "SPLITS",
    "TEMPLATES",
    "VIEW",
    "EmbeddedDataModule",
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
        grey: Share of the training pictures that are shown in grey, in [0, 1]. ValueError: without ``augment``.
        image_views, text_view: as in ``ShardDataModule``; further views are drawn from random views.
        revision: 1, 2 or 3, see above; the architecture's vocabulary must be of its names. ValueError: another one.
    """

    def __init__(
        self,
        architecture: str = "common/shapes_clip.json",
        batch_size: int = 128,
        num_workers: int = 1,
        seed: int = 0,
        max_damaged: float = 0.0,
        root: str | None = None,
        captions: bool = True,
        image_size: int | None = None,
        train_fraction: float = 1.0,
        augment: bool = True,
        revision: int = CURRENT,
        grey: float = 0.0,
        image_views: Sequence[str] = (),
        text_view: str | None = None,
    ) -> None:
        views = scenes_of(revision).VIEWS
        if image_size not in (None, *views):
            raise ValueError(f"image_size {image_size}: the embedded pictures are drawn at one of {views} pixels")
        if not 0 <= grey <= 1:
            raise ValueError(f"grey {grey} is no share of the training pictures; it lies in [0, 1]")
        if grey and not augment:
            raise ValueError(
                f"grey {grey} changes training pictures, and augment false shows them as they are; set one"
            )
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
        self.view, self.revision, self.grey = image_size or VIEW, revision, grey
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
        """Random view of the stored canvas for training, some of them in grey; its centre otherwise."""
        sizes = {"image_size": self.image_size, "view": self.view}
        if not train:
            return partial(center_view, **sizes)
        shown = partial(random_view, **sizes, shift=SHIFT * self.view / VIEW)
        return after(shown, partial(sometimes_grey, share=self.grey)) if self.grey else shown

    def view_transform(self, view: Augmentation) -> Transform:
        """A further view: the augmentation of a random view."""
        return after(self.picture_transform(train=True), view.transform(self.image_size))
