"""A classification set as training pairs, on a miniature Fashion-MNIST in its real format."""

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from common.clip import load_architecture
from common.data import catalogue
from common.data.classification_module import ClassificationDataModule, EpochLoader
from common.pretraining import CLIPPretraining
from common.tokenizer import Tokenizer, encode
from common.zeroshot import fill
from tests.common.data.miniature import SPLITS, paint, small, write_dtd, write_idx
from tests.common.data.processes import validated_by_two

ARCHITECTURE = "common/fashion_mnist_clip.json"
TRAIN = [(number, number % 3) for number in range(22)]
TEST = [(100 + number, number % 3) for number in range(5)]


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Makes the data module over 22 training and 5 test pictures of three classes."""
    for prefix, rows in {"train": TRAIN, "t10k": TEST}.items():
        write_idx(tmp_path / "FashionMNIST/raw", ".gz", prefix, rows)
    of = small(catalogue.entry("fashion_mnist"), {"train": TRAIN, "test": TEST}, 10)
    monkeypatch.setattr(catalogue, "entry", lambda name, protocol="mlip": of)

    def make(**options):
        options = {"root": str(tmp_path), "held_out": 4, "batch_size": 4, "num_workers": 0, **options}
        return ClassificationDataModule("fashion_mnist", architecture=ARCHITECTURE, **options)

    return make


def keys(batches):
    return [key for batch in batches for key in batch["key"]]


def test_the_vocabulary_of_the_architecture_is_that_of_the_prompts():
    of, text = catalogue.entry("fashion_mnist"), load_architecture(ARCHITECTURE)["text_cfg"]
    prompts = [fill(template, name) for template in of.templates for name in of.rename.values()]
    assert text["vocabulary"] == sorted({token for prompt in prompts for token in encode(prompt)})
    assert max(len(encode(prompt)) for prompt in prompts) <= text["context_length"]


def test_a_picture_has_a_prompt_of_its_class_and_all_of_a_class_are_positives(module):
    data = module()
    of, text = catalogue.entry("fashion_mnist"), data.architecture["text_cfg"]
    tokenizer = Tokenizer(text["context_length"], text["vocabulary"])
    names = list(of.rename.values())
    prompts = {(fill(t, name), label) for label, name in enumerate(names) for t in of.templates}
    spelled = {(tuple(tokenizer.ids(prompt)), label) for prompt, label in prompts}
    drawn, pairs = set(), set()
    for epoch in range(6):
        for place in data.train_dataloader().batches(epoch):
            for sample in (data.view[item] for item in place):
                drawn.add((tuple(sample["ids"]), sample["label"]))
                pairs.add((sample["caption_id"], sample["label"]))
    assert drawn <= spelled and len(drawn) == 3 * len(of.templates), "every prompt of the three classes comes"
    assert len(pairs) == len({caption for caption, _ in pairs}) == len({label for _, label in pairs}) == 3
    assert data.class_prompts == [of.templates[0].replace("{}", name) for name in names]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_shows_every_picture_once_in_full_batches(module, workers):
    data = module(num_workers=workers)
    batches = list(data.train_dataloader())
    assert len(batches) == len(data.train_dataloader()) == 4  # of 18 pictures
    assert [tuple(batch["image"].shape) for batch in batches] == [(4, 3, 32, 32)] * 4
    assert all({"image", "text", "caption_id", "label", "key"} == batch.keys() for batch in batches)
    assert len(set(keys(batches))) == 16
    again = list(module().train_dataloader())
    assert keys(again) == keys(batches), "the order follows from seed and epoch"
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(again, batches, strict=True))
    assert all(torch.equal(a["text"], b["text"]) for a, b in zip(again, batches, strict=True))
    labels = {f"train/{number:06d}": label for number, label in TRAIN}
    assert all(
        labels[key] == label for batch in batches for key, label in zip(batch["key"], batch["label"], strict=True)
    )
    assert keys(module(seed=1).train_dataloader()) != keys(batches)


def test_processes_share_an_epoch(module):
    data = module(held_out=2)
    parts = [EpochLoader(data.view, data.preprocess, 4, 0, lambda: (0, 0), rank, 2) for rank in (0, 1)]
    assert [len(part) for part in parts] == [2, 2]
    shares = [set(keys(part)) for part in parts]
    assert len(shares[0]) == len(shares[1]) == 8 and not shares[0] & shares[1]


def test_two_processes_evaluate_every_picture_exactly_once(tmp_path, module):
    data = module(held_out=5)
    found = validated_by_two(data, tmp_path)
    assert [len(keys) for keys in found] == [3, 2]
    assert sorted(found[0] + found[1]) == data.val_pictures.keys


def test_held_out_pictures_are_apart_and_the_same_for_all_seeds(module):
    first, second = module(), module(seed=1, held_out=4)
    held = keys(first.val_dataloader())
    assert len(held) == 4 and held == keys(second.val_dataloader()) == sorted(held)
    assert not set(held) & set(first.training.keys) and len(first.view) == 18
    assert keys(first.test_dataloader()) == [f"test/{number:06d}" for number in range(5)]
    (batch,) = first.test_dataloader()
    assert batch["label"].tolist() == [label for _, label in TEST] and "text" not in batch


def test_a_set_with_a_val_split_needs_none_held_out(tmp_path, monkeypatch):
    write_dtd(tmp_path)
    of = small(catalogue.entry("dtd"), SPLITS, 2)
    monkeypatch.setattr(catalogue, "entry", lambda name, protocol="mlip": of)
    monkeypatch.setenv("EFFCLIP_DATA", str(tmp_path))
    data = ClassificationDataModule("dtd", architecture="ViT-B-32", batch_size=3, num_workers=0)
    assert data.val_pictures.labels == [label for _, label in SPLITS["val"]] and len(data.view) == 3
    (batch,) = data.train_dataloader()
    assert batch["image"].shape == (3, 3, 224, 224)


class Recorder(Callback):
    """Notes the keys of every batch and saves after some steps."""

    def __init__(self, folder, saved=()):
        self.folder, self.saved, self.keys = folder, saved, []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.keys.append(batch["key"])
        if trainer.global_step in self.saved:
            trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


def test_a_later_epoch_leaves_torchs_generator_as_it_was(module):
    """A resumed run restores it after its first epoch began, so the draws of others would not come again."""
    loader = module().train_dataloader()
    list(loader)
    before = torch.get_rng_state()
    list(loader)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.filterwarnings("ignore")
def test_a_run_goes_on_with_the_batch_after_its_last_one(tmp_path, module):
    def fit(recorder, checkpoint=None):
        torch.manual_seed(0)
        model = CLIPPretraining(ARCHITECTURE, warmup_steps=2)
        trainer = Trainer(
            max_steps=10,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[recorder],
        )
        trainer.fit(model, module(), ckpt_path=checkpoint)
        assert 0 <= trainer.callback_metrics["val_top1"] <= 1
        return model.state_dict()

    whole = Recorder(tmp_path, saved=(3, 4, 6))  # in an epoch's midst, after its last batch, in the second one
    weights = fit(whole)
    assert len(whole.keys) == 10 and whole.keys[:4] != whole.keys[4:8]
    for step in whole.saved:
        rest = Recorder(tmp_path)
        again = fit(rest, tmp_path / f"{step}.ckpt")
        assert rest.keys == whole.keys[step:]
        assert all(torch.equal(again[key], weights[key]) for key in weights)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"held_out": 22}, "held_out 22 of 22 training pictures leaves none on one side"),
        ({"held_out": 0}, "held_out 0 of 22"),
        ({"batch_size": 0}, "batch_size 0 must be at least 1"),
        ({"root": None}, "Fashion-MNIST: give --root or set EFFCLIP_DATA.*apt-get download dataset-fashion-mnist"),
        ({"root": "/no/such/folder"}, "there is no such folder. It needs the four idx files"),
    ],
)
def test_mistakes_name_the_mend(module, monkeypatch, options, message):
    monkeypatch.delenv("EFFCLIP_DATA", raising=False)
    with pytest.raises(ValueError, match=message):
        module(**options)


def test_too_few_pictures_for_a_batch(module):
    with pytest.raises(ValueError, match="18 training pictures do not fill a batch of 19 on 1 processes; lower"):
        module(batch_size=19).train_dataloader()


def test_pictures_of_ones_own_train_validate_and_test(tmp_path):
    for name in ("cat", "dog"):
        for number in range(10):
            paint(tmp_path / "own" / name / f"{number}.png", number)
    data = ClassificationDataModule(
        str(tmp_path / "own"), "ViT-B-32", batch_size=4, num_workers=0, flip=True, image_size=16
    )
    assert data.splits == ("train", "val", "test") and data.class_prompts == ["a photo of a cat.", "a photo of a dog."]
    assert [len(part) for part in (data.training, data.val_pictures, data.test_pictures)] == [14, 2, 4]
    for batch in (next(iter(data.train_dataloader())), next(iter(data.test_dataloader()))):
        assert batch["image"].shape == (4, 3, 16, 16)
