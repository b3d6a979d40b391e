"""Training pairs per second from the same shards: our loader beside open_clip's own WebDataset pipeline.

Both crop a box of 0.9 to 1 of the image's area, resize it bicubically, normalise, and tokenize the caption with the
same tokenizer, in the same number of worker processes. open_clip's side consists of its own stages in its own order.
Only its tar reader is replaced by webdataset's: it raises a KeyError at the marks that webdataset 1.0 puts between
shards.
"""

from __future__ import annotations

import io
import time
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import webdataset as wds
from open_clip.transform import image_transform
from open_clip_train.data import (
    SharedEpoch,
    detshuffle2,
    filter_no_caption_or_no_image,
    log_and_continue,
)
from PIL import Image

from benchmarks.cells import table
from benchmarks.embedded import REVISION
from common.conditions import conditions
from common.data.embedded.module import pack, scene
from common.data.packing import write_manifest, write_tar
from common.data.shards import ShardDataModule
from common.paths import runs_directory, written_whole
from common.preprocess import MEAN, STD
from common.timing import ratio

WORKERS = 2
_PHOTO = (320, 256)  # width and height of a usual web image after img2dataset has resized it to 256 px


def run(smoke: bool = False) -> dict[str, Any]:
    """Measure both loaders on the embedded shards and on images of a photo's size, in alternating rounds."""
    rounds, batch, shards, samples = (1, 8, WORKERS, 16) if smoke else (5, 128, 8, 256)
    drawn = sorted(pack("val" if smoke else "train", revision=REVISION).glob("*.tar"))[:shards]
    rows = [
        _row("embedded pictures, 56 px", drawn, "common/shapes_clip.json", batch, rounds),
        _row(f"JPEGs of {_PHOTO[0]}x{_PHOTO[1]} px", _photo_shards(shards, samples), "ViT-B-32", batch, rounds),
    ]
    return {
        "name": "loading",
        "conditions": conditions("embedded", seeds=1, rounds=rounds, batch=batch, workers=WORKERS),
        "rows": rows,
    }


def _row(pictures: str, shards: list[Path], architecture: str, batch: int, rounds: int) -> dict[str, Any]:
    data = ShardDataModule(_pattern(shards), architecture=architecture, batch_size=batch, num_workers=WORKERS)
    ours, epoch = data.train_dataloader(), SharedEpoch()
    theirs = _open_clips(data, shards, len(ours), epoch)
    spent: dict[str, list[float]] = {"ours": [], "open_clip": []}
    for number in range(rounds + 1):
        epoch.set_value(number)
        for name, loader in (("ours", ours), ("open_clip", theirs)):
            rate = _pictures_per_second(loader)
            if number:  # the first round starts the workers
                spent[name].append(1 / rate)
    rates = {name: {"rounds": seconds, "pictures_per_second": 1 / median(seconds)} for name, seconds in spent.items()}
    return {"pictures": pictures, **rates, "ratio": ratio(rates["open_clip"], rates["ours"])}


def _pattern(shards: list[Path]) -> str:
    """The shards as one brace pattern."""
    return f"{shards[0].parent}/{{{','.join(shard.stem for shard in shards)}}}.tar"


def _open_clips(data: ShardDataModule, shards: list[Path], batches: int, epoch: SharedEpoch) -> wds.WebLoader:
    """open_clip's training pipeline over the same shards, with as many batches as our epoch."""
    size = data.architecture["vision_cfg"]["image_size"]
    transform = image_transform(size, is_train=True, mean=MEAN, std=STD)
    dataset = wds.DataPipeline(
        wds.SimpleShardList(_pattern(shards)),
        detshuffle2(bufsize=2000, initial=500, seed=0, epoch=epoch),
        wds.split_by_node,
        wds.split_by_worker,
        wds.tarfile_to_samples(handler=log_and_continue),
        wds.shuffle(bufsize=5000, initial=1000),
        wds.select(filter_no_caption_or_no_image),
        wds.decode("pilrgb", handler=log_and_continue),
        wds.rename(image="jpg;png;jpeg;webp", text="txt"),
        wds.map_dict(image=transform, text=lambda text: data.tokenizer([text])[0]),
        wds.to_tuple("image", "text"),
        wds.batched(data.batch_size, partial=False),
    ).with_epoch(batches // WORKERS)
    return wds.WebLoader(dataset, batch_size=None, shuffle=False, num_workers=WORKERS, persistent_workers=True)


def _pictures_per_second(loader: Iterable) -> float:
    start, pictures = time.perf_counter(), 0
    for batch in loader:
        pictures += len(batch["image"] if isinstance(batch, dict) else batch[0])
    return pictures / (time.perf_counter() - start)


def _photo_shards(shards: int, samples: int) -> list[Path]:
    """Shards of images with a photo's size and detail: enlarged scenes with seeded noise."""
    folder = runs_directory() / "data" / f"loading-{shards}x{samples}"
    if not folder.exists():
        rng = np.random.default_rng(0)
        drawn = [_photo(number, rng) for number in range(64)]
        with written_whole(folder) as unfinished:
            unfinished.mkdir()
            entries = {}
            for shard in range(shards):
                entries[f"{shard:03d}.tar"] = write_tar(
                    unfinished / f"{shard:03d}.tar",
                    ({"__key__": f"{shard:03d}{place:05d}", **drawn[place % 64]} for place in range(samples)),
                )
            write_manifest(unfinished, entries, "Twemoji, CC-BY 4.0, enlarged")
    return sorted(folder.glob("*.tar"))


def _photo(number: int, rng: np.random.Generator) -> dict[str, bytes]:
    picture, caption = scene("train", number, REVISION)
    pixels = np.asarray(picture.render().resize(_PHOTO, Image.Resampling.BICUBIC)).astype(np.float32)
    noisy = pixels + rng.normal(0, 12, pixels.shape[:2])[..., None]
    file = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return {"jpg": file.getvalue(), "txt": caption.encode()}


def render(result: dict[str, Any]) -> dict[str, Any]:
    """The result as {"md": Markdown, "figures": {}}."""
    rows = []
    for row in result["rows"]:
        sides = [f"{row[name]['pictures_per_second']:,.0f}" for name in ("ours", "open_clip")]
        rows.append([row["pictures"], *sides, f"{row['ratio']:.2f}"])
    rates = table(["pictures", "ours, pairs/s", "open_clip, pairs/s", "ratio"], rows)
    run = result["conditions"]
    note = (
        f"Medians of {run['rounds']} alternating rounds (of the ratios too), {run['workers']} worker processes, "
        f"batch {run['batch']}, {run['threads']} threads."
    )
    return {"md": f"On {run['device']}:\n\n{rates}\n\n{note}\n", "figures": {}}
