"""The loader benchmark: both sides deliver the same pairs' worth of batches from the same shards."""

import torch
from open_clip_train.data import SharedEpoch

from benchmarks.speed.loading import WORKERS, _open_clips, _pattern, render
from common.clip import CLIP
from common.data.reader import expand
from common.data.shards import ShardDataModule
from common.data.smoke import write_shards
from common.testing import TINY_CAPTIONS, tiny_architecture


def test_open_clips_pipeline_gives_what_ours_gives(tmp_path):
    write_shards(tmp_path / "shards", WORKERS, 8, txt=lambda n: TINY_CAPTIONS[n % 6].encode())
    shards = sorted((tmp_path / "shards").glob("*.tar"))
    assert expand(_pattern(shards)) == [str(shard) for shard in shards]
    options = {"architecture": tiny_architecture(tmp_path), "batch_size": 4, "num_workers": WORKERS}
    data = ShardDataModule(_pattern(shards), **options)
    ours = data.train_dataloader()
    theirs = _open_clips(data, shards, len(ours), SharedEpoch())
    size = CLIP.tiny().architecture["vision_cfg"]["image_size"]
    found = [(len(batch["image"]), batch["image"].shape[1:]) for batch in ours]
    assert found == [(len(image), image.shape[1:]) for image, _ in theirs] == [(4, (3, size, size))] * 4
    assert {tuple(row.tolist()) for _, text in theirs for row in text} == {
        tuple(row.tolist()) for row in data.tokenizer(list(TINY_CAPTIONS))
    }


def test_the_table_says_both_rates_and_their_ratio():
    side = {"rounds": [0.1], "pictures_per_second": 1234.4}
    row = {"pictures": "small ones", "ours": side, "open_clip": {**side, "pictures_per_second": 600.0}, "ratio": 2.057}
    stated = {"rounds": 1, "workers": 2, "batch": 4, "device": "a CPU", "threads": torch.get_num_threads()}
    assert "| small ones | 1,234 | 600 | 2.06 |" in render({"rows": [row], "conditions": stated})["md"]
