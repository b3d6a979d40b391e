"""The noise that a smoke run trains on."""

from common.data.smoke import SmokeDataModule
from common.testing import tiny_architecture


def test_shards_are_written_once_and_read_by_every_split(tmp_path, monkeypatch):
    monkeypatch.setenv("EFFCLIP_RUNS", str(tmp_path / "runs"))
    data = SmokeDataModule("ViT-B-32", global_batch_size=16)
    (shard,) = (tmp_path / "runs").rglob("000.tar")
    written = shard.stat().st_mtime_ns
    assert SmokeDataModule(tiny_architecture(tmp_path)).splits == ["train", "val", "test"]
    assert shard.stat().st_mtime_ns == written
    first, second = data.test_dataloader()
    assert first["image"].shape == (16, 3, 224, 224) and second["label"].tolist() == [0, 1, 2, 3] * 4
    assert len(set(first["caption_id"].tolist())) == 16 and data.class_prompts[3] == "picture number 3"
    assert len(data.train_dataloader()) == 2
