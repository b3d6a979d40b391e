"""The shard loader: who reads what and when, exact counts, damage, and members that must never be decoded."""

import contextlib
import json
import logging
import os
import pickle
from collections import Counter
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from random import Random
from threading import Thread
from types import SimpleNamespace

import lightning
import pytest
import torch
import webdataset
from torch.utils.data import DataLoader

from common.data import tar
from common.data.account import Account
from common.data.reader import ShardDataset, caption_id, expand, shuffled
from common.data.shards import ShardDataModule
from common.data.smoke import jpeg, write_shards
from common.data.tar import Shard
from tests.common.data.processes import validated_by_two


@pytest.fixture
def architecture(tmp_path):
    file = tmp_path / "tiny.json"
    vision = {"image_size": 8, "patch_size": 4, "width": 64, "layers": 1, "head_width": 64}
    text = {"context_length": 8, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1}
    file.write_text(json.dumps({"embed_dim": 32, "vision_cfg": vision, "text_cfg": text}))
    return str(file)


@pytest.fixture
def module(architecture):
    """Makes a ShardDataModule; ``rank`` and ``world`` stand in for a trainer."""

    def make(train=None, val=None, rank=0, world=1, **options):
        options = {"batch_size": 4, "num_workers": 0, "shuffle_buffer": 5, **options}
        data = ShardDataModule(train, val, architecture=architecture, **options)
        if world > 1:
            progress = SimpleNamespace(batch_progress=SimpleNamespace(total=SimpleNamespace(processed=0)))
            start = {"fit_loop": SimpleNamespace(epoch_loop=progress), "num_training_batches": 1}
            data.trainer = SimpleNamespace(global_rank=rank, world_size=world, current_epoch=0, **start)
        return data

    return make


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


# --- who reads what ---


@pytest.mark.parametrize(("world", "workers"), [(1, 1), (2, 1), (1, 3), (2, 2), (4, 2)])
def test_training_covers_every_shard_every_epoch_in_a_new_seeded_order(world, workers):
    shards = [Shard(str(number), None) for number in range(11)]

    def epoch_of(epoch, seed=0):
        readers = [
            ShardDataset(shards, None, 4, batches=1, rank=rank, world=world, seed=seed).reader_shards(epoch, w, workers)
            for rank in range(world)
            for w in range(workers)
        ]
        assert len({len(reader) for reader in readers}) == 1
        return readers

    for epoch in range(3):
        counts = Counter(shard for reader in epoch_of(epoch) for shard in reader)
        assert set(counts) == set(shards) and sum(counts.values()) - 11 < world * workers
    assert epoch_of(0) == epoch_of(0) and epoch_of(0) != epoch_of(1) and epoch_of(0) != epoch_of(0, seed=1)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("workers", [0, 2, 4])
def test_evaluation_reads_every_sample_exactly_once(tmp_path, module, world, workers):
    pattern = write_shards(tmp_path / "val", 9, 3)
    found = []
    for rank in range(world):
        loader = module(val=pattern, rank=rank, world=world, num_workers=workers).val_dataloader()
        batches = list(loader)
        assert len(batches) == len(loader)
        found += keys(batches)
    assert sorted(found) == sorted(f"s{shard}-{sample}" for shard in range(9) for sample in range(3))


def test_spawned_workers_keep_their_rank(tmp_path, module):
    dataset = module(val=write_shards(tmp_path / "val", 4, 2), rank=1, world=2).val_dataloader().source
    batches = DataLoader(dataset, batch_size=None, num_workers=2, multiprocessing_context="spawn")
    assert sorted(keys(batches)) == ["s1-0", "s1-1", "s3-0", "s3-1"]


@pytest.mark.parametrize("workers", [0, 2])
def test_two_processes_read_every_sample_exactly_once(tmp_path, module, workers):
    data = module(val=write_shards(tmp_path / "val", 5, 3), num_workers=workers)
    found = validated_by_two(data, tmp_path)
    assert [len(keys) for keys in found] == [9, 6]
    assert sorted(found[0] + found[1]) == sorted(f"s{shard}-{sample}" for shard in range(5) for sample in range(3))


@pytest.mark.parametrize("workers", [0, 2])
def test_training_length_is_true_and_epochs_differ_but_repeat(tmp_path, module, workers):
    pattern = write_shards(tmp_path / "train", 5, 7, manifest=True)
    loader, twin = (module(pattern, num_workers=workers).train_dataloader() for _ in range(2))
    epochs = [keys(loader) for _ in range(3)]  # with workers: the same processes, told the new epoch
    assert {len(epoch) for epoch in epochs} == {4 * len(loader)}
    assert len(loader) == (8 if workers == 0 else 10)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [keys(twin) for _ in range(3)] == epochs


def test_a_reader_short_of_samples_starts_over_to_deliver_its_batches(tmp_path, module):
    pattern = write_shards(tmp_path / "train", 2, 4)
    assert len(keys(module(pattern, train_num_samples=16).train_dataloader())) == 16


def test_the_random_view_depends_on_epoch_and_key_alone(tmp_path, module):
    pattern = write_shards(tmp_path / "train", 4, 4)

    def pictures(epoch, **options):
        loader = module(pattern, **options).train_dataloader()
        loader.source.set_position(epoch)
        batches = iter(loader.source)
        return {key: image for batch in batches for key, image in zip(batch["key"], batch["image"], strict=True)}

    first, same, later = pictures(0), pictures(0, batch_size=2, shuffle_buffer=16), pictures(1)
    assert first.keys() == same.keys() and all(torch.equal(first[key], same[key]) for key in first)
    assert any(not torch.equal(first[key], later[key]) for key in first)


def test_without_augmentation_training_shows_the_evaluation_view(tmp_path, module):
    data = module(write_shards(tmp_path / "train", 2, 8), augment=False)
    shown, stored = (
        {key: image for batch in loader for key, image in zip(batch["key"], batch["image"], strict=True)}
        for loader in (data.train_dataloader(), data.dataloader("train", train=False))
    )
    assert shown.keys() == stored.keys() and all(torch.equal(shown[key], stored[key]) for key in stored)


def test_the_trainer_says_the_epoch(tmp_path, module):
    class Recorder(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(1, 1)
            self.epochs = {}

        def training_step(self, batch, batch_idx):
            self.epochs.setdefault(self.current_epoch, []).extend(batch["key"])
            return self.layer(torch.ones(1)).sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    data = module(write_shards(tmp_path / "train", 4, 4))
    model = Recorder()
    lightning.Trainer(
        max_steps=12, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    ).fit(model, data)
    expected = ShardDataModule.train_dataloader(module(write_shards(tmp_path / "again", 4, 4)))
    assert model.epochs == {epoch: keys(expected) for epoch in range(3)}


def test_shuffled_is_a_seeded_permutation():
    orders = [list(shuffled(iter(range(50)), 10, Random(seed))) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2] and sorted(orders[0]) == list(range(50)) != orders[0]
    assert list(shuffled(iter(range(5)), 1, Random(0))) == list(range(5))


# --- what a batch holds ---


def test_a_batch(tmp_path, module):
    def caption(number):
        return b"a cat" if number % 2 else b"a rather long caption that has to be cut at eight"

    pattern = write_shards(tmp_path / "val", 1, 6, txt=caption, json=lambda n: json.dumps({"label": n}).encode())
    batch, rest = module(val=pattern).val_dataloader()
    assert batch["image"].shape == (4, 3, 8, 8) and batch["image"].dtype == torch.float32
    assert batch["text"].shape == (4, 8) and batch["text"][1].tolist() == [
        49406,
        320,
        2368,
        49407,
        0,
        0,
        0,
        0,
    ]
    assert batch["label"].tolist() == [0, 1, 2, 3] and rest["label"].tolist() == [4, 5]
    ids = batch["caption_id"].tolist()
    assert ids[1] == ids[3] == caption_id("a cat") != ids[0] == ids[2]


def test_pictures_of_another_size_than_the_architectures(tmp_path, module):
    pattern = write_shards(tmp_path / "both", 1, 4)
    data = module(pattern, pattern, image_size=20, train_num_samples=4)
    for loader in (data.train_dataloader(), data.val_dataloader()):
        assert next(iter(loader))["image"].shape == (4, 3, 20, 20)


def test_text_is_as_wide_as_the_longest_caption(tmp_path, module):
    (batch,) = module(val=write_shards(tmp_path / "val", 1, 3, txt=lambda n: b"a cat")).val_dataloader()
    assert batch["text"].shape == (3, 4)


def test_labels_come_from_cls_too_and_not_from_other_json(tmp_path, module):
    pattern = write_shards(tmp_path / "a", 1, 3, cls=lambda n: str(n).encode())
    (batch,) = module(val=pattern).val_dataloader()
    assert batch["label"].tolist() == [0, 1, 2]
    (batch,) = module(val=write_shards(tmp_path / "b", 1, 3, json=lambda n: b'{"width": 12}')).val_dataloader()
    assert "label" not in batch


# --- what is refused ---


def test_missing_shards_fail_at_once(tmp_path, module):
    write_shards(tmp_path / "train", 2, 2)
    with pytest.raises(ValueError, match=r"2 of 4 shards .* are missing, first .*002\.tar"):
        module(f"{tmp_path}/train/{{000..003}}.tar")


def test_variables_are_expanded(tmp_path, monkeypatch):
    write_shards(tmp_path / "train", 2, 1)
    monkeypatch.setenv("SHARDS", str(tmp_path))
    assert expand("${SHARDS}/train/{000..001}.tar") == [f"{tmp_path}/train/00{i}.tar" for i in (0, 1)]


def test_pipes_only_where_they_are_allowed(tmp_path, module):
    write_shards(tmp_path / "train", 1, 4)
    pattern = f"pipe:cat {tmp_path}/train/000.tar"
    with pytest.raises(ValueError, match="allow_pipe"):
        module(pattern)
    loader = module(pattern, allow_pipe=True, train_num_samples=4).train_dataloader()
    assert sorted(keys(loader)) == [f"s0-{i}" for i in range(4)]


def test_shards_over_http_and_one_that_is_not_there(tmp_path, module, monkeypatch):
    write_shards(tmp_path / "val", 2, 4)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(tar, "_PAUSE", 0)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=tmp_path)) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        try:
            place = f"http://127.0.0.1:{server.server_port}/val"
            found = keys(module(val=place + "/{000..001}.tar").val_dataloader())
            with pytest.raises(ValueError, match=r"/val/002\.tar cannot be read \(curl: the server has no such file\)"):
                list(module(val=place + "/{000..002}.tar").val_dataloader())
        finally:
            server.shutdown()
    assert found == [f"s{shard}-{sample}" for shard in range(2) for sample in range(4)]


def test_fewer_shards_than_readers_cannot_train(tmp_path, module):
    pattern = write_shards(tmp_path / "train", 3, 4)
    with pytest.raises(ValueError, match="cannot feed 1 processes x 4 workers; use at most 3 workers"):
        module(pattern, num_workers=4).train_dataloader()
    with pytest.raises(ValueError, match="smaller shards"):
        module(pattern, world=4).train_dataloader()


def test_unknown_numbers(module):
    urls = "http://localhost/{000..001}.tar"
    with pytest.raises(ValueError, match="train_num_samples"):
        module(urls).train_dataloader()
    assert len(module(urls, train_num_samples=100).train_dataloader()) == 25
    with pytest.raises(TypeError, match="unknown"):
        len(module(val=urls).val_dataloader())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size 0"),
        ({"batch_size": None, "global_batch_size": 0}, "global_batch_size 0"),
        ({"global_batch_size": 8}, "both given; set one of them to null"),
        ({"num_workers": -1}, "num_workers -1"),
        ({"max_damaged": 1.0}, "1.0"),
    ],
)
def test_senseless_options(module, options, message):
    with pytest.raises(ValueError, match=message):
        module(**options)


def test_a_batch_larger_than_a_readers_share(tmp_path, module):
    with pytest.raises(ValueError, match="below batch_size 4"):
        module(write_shards(tmp_path / "train", 2, 3), num_workers=2).train_dataloader()
    with pytest.raises(ValueError, match="no shards for split 'val'"):
        module().val_dataloader()


def test_the_global_batch_is_divided_among_the_devices(tmp_path, module):
    pattern = write_shards(tmp_path / "train", 6, 8)
    options = {"batch_size": None, "global_batch_size": 12}
    for world in (1, 2, 3):
        batches = list(module(pattern, world=world, **options).train_dataloader())
        assert {len(batch["image"]) for batch in batches} == {12 // world} and len(batches) == 4
    with pytest.raises(ValueError, match="global_batch_size 12 cannot be divided among 5 devices; use 10 or 15"):
        module(pattern, world=5, **options).train_dataloader()
    assert module(pattern, batch_size=None).device_batch_size(3) == 256


def test_fewer_shards_than_readers_still_evaluate_every_sample_once(tmp_path, module):
    pattern = write_shards(tmp_path / "val", 2, 7)
    read = []
    for rank in range(3):
        loader = module(val=pattern, rank=rank, world=3, num_workers=2).val_dataloader()
        batches = list(loader)
        assert len(batches) == len(loader) > 0
        read += keys(batches)
    assert sorted(read) == sorted(f"s{shard}-{sample}" for shard in range(2) for sample in range(7))


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


def test_a_training_prints_its_account_and_saves_it_in_the_checkpoint(tmp_path, module, caplog):
    pattern = write_shards(tmp_path / "train", 4, 4, txt=lambda n: b"" if n == 3 else b"a cat")
    data = module(pattern, max_damaged=0.5)
    trainer = lightning.Trainer(max_steps=4, accelerator="cpu", logger=False, enable_progress_bar=False)
    with caplog.at_level(logging.INFO):
        trainer.fit(Counting(), data)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    account = {"read": 16, "delivered": 15, "rejected": {"unusable caption": 1}, "ignored": {}}
    saved = torch.load(tmp_path / "a.ckpt", weights_only=False)["ShardDataModule"]
    assert saved == {"accounts": {"train": account}}
    assert "train samples: 16 read, 15 delivered, 1 rejected (1 unusable caption)" in caplog.text


@pytest.mark.parametrize("label", [b'"cat"', b"[1, 2]", b"{}", b"3.7", b"true", b"null"])
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
    with pytest.raises(ValueError, match="hold about 0 samples"):
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
