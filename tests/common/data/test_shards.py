"""The shard loader: who reads what and when, exact counts, what a batch holds, and what is refused."""

import json
import multiprocessing
from collections import Counter
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from random import Random
from threading import Thread
from types import SimpleNamespace

import lightning
import pytest
import torch
from torch.utils.data import DataLoader

from common.data import tar
from common.data.loader import position
from common.data.reader import ShardDataset, caption_id, expand, shuffled
from common.data.shards import ShardDataModule
from common.data.smoke import write_shards
from common.data.tar import Shard
from tests.common.data.processes import validated_by_two


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


@pytest.mark.parametrize("manifest", [True, False])
def test_a_fraction_reads_the_first_shards_and_shortens_the_epoch_by_the_others(tmp_path, module, manifest):
    pattern = write_shards(tmp_path / "train", 5, 8, manifest=manifest)
    data = module(pattern, pattern, train_num_samples=40, train_fraction=0.5)  # of five shards three
    loader = data.train_dataloader()
    read = set(keys(loader))
    assert len(loader) == 6 and read == {f"s{shard}-{sample}" for shard in range(3) for sample in range(8)}
    assert len(keys(data.val_dataloader())) == 40
    with pytest.raises(ValueError, match=r"train_fraction 1.5 is not in \(0, 1\]"):
        module(pattern, train_fraction=1.5)
    remote = module("http://localhost/{000..003}.tar", train_num_samples=100, train_fraction=0.75)
    assert len(remote.train_dataloader()) == 18  # 75 pairs in batches of 4


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


@pytest.mark.parametrize(("overfit", "epochs"), [(0.0, [0, 0, 1, 1]), (2, [0, 0, 0, 0])])
def test_a_trainer_that_overfits_some_batches_sees_the_same_ones_again(overfit, epochs):
    def at(done):
        progress = SimpleNamespace(total=SimpleNamespace(processed=done))
        loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress))
        return position(SimpleNamespace(fit_loop=loop, num_training_batches=2, overfit_batches=overfit))

    assert [at(done) for done in range(4)] == list(zip(epochs, [0, 1, 0, 1], strict=True))


def test_workers_end_with_the_run(tmp_path, module):
    data = module(write_shards(tmp_path / "train", 2, 4), batch_size=2, num_workers=2)
    before = set(multiprocessing.active_children())
    next(iter(data.train_dataloader()))
    workers = set(multiprocessing.active_children()) - before
    data.teardown("fit")
    assert len(workers) == 2 and not any(worker.is_alive() for worker in workers)
    assert next(iter(data.train_dataloader()))["key"], "a later run begins anew"
