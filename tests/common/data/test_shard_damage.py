"""Shards that are cut, damaged or miscounted: what is refused, what is counted, and what must never be decoded."""

import contextlib
import io
import logging
import os
import pickle
import tarfile

import lightning
import pytest
import torch
import webdataset

from common.data.account import Account
from common.data.reader import expand
from common.data.smoke import jpeg, write_shards


class Counting(lightning.LightningModule):
    """A model that takes any batch and learns nothing of it."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(torch.ones(1)).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def keys(batches):
    return [key for batch in batches for key in batch["key"]]


# --- what is refused and what is counted ---


def test_shards_that_were_cut_after_packing_are_refused_at_the_start(tmp_path, module):
    pattern = write_shards(tmp_path / "train", 3, 4, manifest=True)
    with open(tmp_path / "train" / "001.tar", "r+b") as file:
        file.truncate(2048)
    for options in ({}, {"train_num_samples": 12}):
        with pytest.raises(ValueError, match=r"1 of 3 shards were cut .*001\.tar has 2048 bytes"):
            module(pattern, **options).train_dataloader()


def test_a_stated_number_that_the_headers_contradict(tmp_path, module):
    pattern = write_shards(tmp_path / "train", 3, 8)
    with pytest.raises(ValueError, match="train_num_samples is 240, but the 3 shards hold about 24 samples"):
        module(pattern, train_num_samples=240)
    assert module(pattern, train_num_samples=25).train_num_samples == 25


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("{folder}/*.tar", r"is a glob \(of 2 files\); name the shards by their numbers"),
        ("{folder}", "is a folder; name its shards"),
        ("{folder}/000.tar::{folder}/001.tar", "joins shards by '::'"),
        ("$NOT_SET/000.tar", "set the environment variable NOT_SET"),
        ("{folder}/2024-01-01T12:00:00.tar", "1 of 1 shards"),
    ],
)
def test_patterns_that_name_no_shards(tmp_path, pattern, message):
    write_shards(tmp_path / "train", 2, 1)
    with pytest.raises(ValueError, match=message):
        expand(pattern.replace("{folder}", f"{tmp_path}/train"))


@pytest.mark.parametrize("workers", [0, 2])
def test_the_account_of_a_loader(tmp_path, module, workers):
    pattern = write_shards(tmp_path / "val", 4, 6, txt=lambda n: b"" if n in (3, 9, 20) else b"a cat")
    loader = module(val=pattern, num_workers=workers, max_damaged=0.5).val_dataloader()
    list(loader)
    assert loader.account.to_dict() == {
        "read": 24,
        "delivered": 21,
        "rejected": {"unusable caption": 3},
        "ignored": {},
    }


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_readers_that_share_a_shard_count_its_damage_once(tmp_path, module, workers):
    pattern = write_shards(tmp_path / "val", 1, 12, txt=lambda n: b"" if n == 5 else b"a cat")
    with tarfile.open(tmp_path / "val" / "000.tar", "a") as tar:
        for name, content in (("s0-0.txt", b"a cat"), ("s0-0.jpg", jpeg(0)), ("notes.md", b"words")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    loader = module(val=pattern, num_workers=workers, max_damaged=0.5).val_dataloader()
    assert len(keys(loader)) == 11
    assert loader.account.to_dict() == {
        "read": 13,
        "delivered": 11,
        "rejected": {"repeated key": 1, "unusable caption": 1},
        "ignored": {"kind that is not read": 1},
    }


@pytest.mark.parametrize("workers", [1, 8])
def test_readers_that_share_a_shard_are_held_to_the_limit(tmp_path, module, workers):
    pattern = write_shards(tmp_path / "val", 1, 40, txt=lambda n: b"" if n < 8 else b"a cat")
    with pytest.raises(ValueError, match=r"samples are damaged, above max_damaged=0\.1"):
        list(module(val=pattern, num_workers=workers, max_damaged=0.1).val_dataloader())


def test_a_training_prints_its_account_and_saves_it_in_the_checkpoint(tmp_path, module, caplog):
    pattern = write_shards(tmp_path / "train", 4, 4, txt=lambda n: b"" if n == 3 else b"a cat")
    data = module(pattern, max_damaged=0.5)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    trainer = lightning.Trainer(max_steps=4, accelerator="cpu", default_root_dir=tmp_path, **quiet)
    with caplog.at_level(logging.INFO):
        trainer.fit(Counting(), data)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    account = {"read": 16, "delivered": 15, "rejected": {"unusable caption": 1}, "ignored": {}}
    saved = torch.load(tmp_path / "a.ckpt", weights_only=False)["ShardDataModule"]
    assert saved == {"accounts": {"train": account}}
    assert "train samples: 16 read, 15 delivered, 1 rejected (1 unusable caption)" in caplog.text


@pytest.mark.parametrize("label", [b'"cat"', b"[1, 2]", b"{}", b"3.7", b"true", b"null", b"18446744073709551615"])
def test_a_label_that_is_no_number_does_not_matter_to_captions(tmp_path, module, label):
    pattern = write_shards(tmp_path / "val", 1, 4, json=lambda n: b'{"label": ' + label + b"}")
    (batch,) = module(val=pattern).val_dataloader()
    assert len(batch["key"]) == 4 and "label" not in batch
    if label != b"null":
        with pytest.raises(ValueError, match="needs a whole number as label"):
            list(module(val=pattern, captions=False).val_dataloader())


# --- damage ---


@pytest.mark.parametrize(
    "damage",
    [
        {"jpg": lambda n: jpeg(n)[:200] if n == 3 else jpeg(n)},
        {"jpg": lambda n: b"no picture" if n == 3 else jpeg(n)},
        {"jpg": lambda n: None if n == 3 else jpeg(n)},
        {"txt": lambda n: b"  " if n == 3 else b"a cat"},
        {"txt": lambda n: b"\xff\xfe" if n == 3 else b"a cat"},
        {"txt": lambda n: None if n == 3 else b"a cat"},
        {"json": lambda n: b"{" if n == 3 else b"{}"},
    ],
    ids=["cut picture", "other bytes", "no picture", "empty caption", "not utf-8", "no caption", "cut json"],
)
def test_a_damaged_sample_is_skipped_and_logged_or_fails_the_run(tmp_path, module, caplog, damage):
    pattern = write_shards(tmp_path / "val", 2, 4, **damage)
    with caplog.at_level(logging.WARNING):
        found = keys(module(val=pattern, max_damaged=0.2).val_dataloader())
    assert len(found) == 7 and "s0-3" not in found
    assert "skipped s0-3" in caplog.text
    with pytest.raises(ValueError, match=r"1 of 8 samples are damaged, above max_damaged=0.1; last s0-3"):
        list(module(val=pattern, max_damaged=0.1).val_dataloader())
    with pytest.raises(ValueError, match="samples are damaged"):
        list(module(pattern, max_damaged=0.1).train_dataloader())


@pytest.mark.parametrize("size", [7 * 512, 7 * 512 + 100, 8 * 512 + 40], ids=["between", "in a header", "in a picture"])
def test_a_truncated_shard(tmp_path, module, caplog, size):
    pattern = write_shards(tmp_path / "val", 2, 8)
    with open(tmp_path / "val" / "000.tar", "r+b") as file:
        file.truncate(os.path.getsize(file.name) // 2)
    found = keys(module(val=pattern, max_damaged=0.9).val_dataloader())
    assert [key for key in found if key.startswith("s1")] == [f"s1-{i}" for i in range(8)]
    assert 0 < len(found) - 8 < 8 and "000.tar" in caplog.text
    with pytest.raises(ValueError, match=r"000\.tar"):
        list(module(val=pattern).val_dataloader())


def test_shards_without_samples_do_not_loop_forever(tmp_path, module):
    pattern = write_shards(tmp_path / "train", 1, 0)
    with pytest.raises(ValueError, match="no sample can be read in"):
        list(module(pattern, train_num_samples=8).train_dataloader())


def test_a_damaged_sample_does_not_move_the_others_in_training(tmp_path, module):
    def batches(name, **damage):
        pattern = write_shards(tmp_path / name, 2, 6, manifest=True, **damage)
        return [batch["key"] for batch in module(pattern, max_damaged=0.2).train_dataloader()]

    sound, damaged = batches("sound"), batches("damaged", txt=lambda n: b"" if n == 3 else b"a cat")
    assert len(damaged) == len(sound) == 3
    for before, after in zip(sound, damaged, strict=True):
        kept = [key for key in before if key != "s0-3"]
        assert after == (kept + kept)[:4]
    with pytest.raises(ValueError, match="all 4 samples of a batch are damaged"):
        batches("all", txt=lambda n: b"")


def test_damage_is_judged_by_its_fraction():
    account = Account(0.01, delivered=10)
    for _ in range(10):
        account.reject("key", "error")  # ten of the first thousand are still 1 %
    with pytest.raises(ValueError, match="11 of 21"):
        account.reject("key", "error")


# --- no pickle ---


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_pickle_is_never_decoded(tmp_path, module):
    fired = str(tmp_path / "fired")
    attack = pickle.dumps(Payload(fired))
    pattern = write_shards(tmp_path / "val", 1, 2, pyd=lambda n: attack, pth=lambda n: attack, pkl=lambda n: attack)
    assert len(keys(module(val=pattern).val_dataloader())) == 2
    assert len(keys(module(pattern, batch_size=2).train_dataloader())) == 2
    assert not os.path.exists(fired)
    control = webdataset.WebDataset(f"{tmp_path}/val/000.tar", shardshuffle=False).decode("pil")
    with contextlib.suppress(webdataset.autodecode.DecodingError):
        next(iter(control))
    assert os.path.exists(fired)
