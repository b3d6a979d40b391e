"""Plain pretraining through the Trainer, on tiny shards."""

import io
import json

import lightning
import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from common import contrastive
from common.data.shards import ShardDataModule
from common.data.smoke import write_shards
from common.preprocess import Preprocess
from common.pretraining import CLIPPretraining
from common.testing import TINY_CAPTIONS, tiny_architecture

QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}


def picture(number):
    """A plain picture whose colour tells its caption."""
    colour = np.random.default_rng(number % len(TINY_CAPTIONS)).integers(0, 256, 3, dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(np.broadcast_to(colour, (32, 32, 3))).save(file, "PNG")
    return file.getvalue()


def caption(number):
    return TINY_CAPTIONS[number % len(TINY_CAPTIONS)].encode()


def label(number):
    return json.dumps({"label": number % len(TINY_CAPTIONS)}).encode()


class LabelledShards(ShardDataModule):
    """Shards whose labels are the captions' places, so that validation classifies by caption."""

    @property
    def class_prompts(self):
        return list(TINY_CAPTIONS)


class ValidatedByClass(LabelledShards):
    """The same, whose training says nothing of the classes."""

    train_class_prompts = None


@pytest.fixture
def parts(tmp_path):
    """Makes module and data; options go to the module."""
    architecture = tiny_architecture(tmp_path)
    members = {"jpg": lambda number: None, "png": picture, "txt": caption, "json": label}
    pattern = write_shards(tmp_path / "shards", 2, 12, **members)

    def make(data=LabelledShards, **options):
        lightning.seed_everything(0, verbose=False)
        options = {"architecture": architecture, "learning_rate": 5e-4, "warmup_steps": 4, **options}
        return CLIPPretraining(**options), data(
            pattern, pattern, pattern, architecture=architecture, batch_size=12, num_workers=0
        )

    return make


@pytest.mark.filterwarnings("ignore")
def test_it_learns_pairs_with_equal_captions_and_its_checkpoint_is_plain(tmp_path, parts):
    module, data = parts()
    trainer = lightning.Trainer(max_steps=20, check_val_every_n_epoch=10, enable_checkpointing=False, **QUIET)
    trainer.fit(module, data)
    # Each caption stands twice in the batch: were the twins negatives, the loss could not fall below log 2.
    assert trainer.callback_metrics["train_loss"] < 0.4
    assert trainer.callback_metrics["val_top1"] == 1.0
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.0  # the cosine ended with the run
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert checkpoint["hyper_parameters"]["learning_rate"] == 5e-4
    again = CLIPPretraining.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    images = next(iter(data.val_dataloader()))["image"]
    with torch.no_grad():
        assert torch.equal(again.clip.encode_image(images), module.cpu().clip.encode_image(images))
    (metrics,) = trainer.test(module, data, verbose=False)
    assert metrics == {"val_top1": 1.0, "val_image_to_text_r1": 1.0, "val_text_to_image_r1": 1.0}


@pytest.mark.filterwarnings("ignore")
def test_the_data_shows_pictures_as_the_model_wants_them(parts):
    module, data = parts(preprocess={"resize_mode": "squash", "std": [0.5, 0.5, 0.5]})
    lightning.Trainer(limit_val_batches=1, **QUIET).validate(module, data, verbose=False)
    assert data.preprocess == Preprocess(32, std=(0.5, 0.5, 0.5), resize_mode="squash")
    assert data.picture_transform(train=False).keywords == {"preprocess": data.preprocess}
    assert module.hparams.preprocess["resize_mode"] == "squash"


@pytest.mark.filterwarnings("ignore")
def test_without_classes_validation_is_the_loss(parts, monkeypatch):
    """It waits for no other process, which may have fewer batches."""
    module, data = parts(data=ShardDataModule)
    monkeypatch.setattr(contrastive, "gather_rows", lambda rows: pytest.fail("another process is waited for"))
    (metrics,) = lightning.Trainer(**QUIET).validate(module, data, verbose=False)
    losses = []
    with torch.no_grad():
        for batch in data.val_dataloader():
            image, text = module(batch["image"], batch["text"])
            logits = module.clip.logit_scale.exp() * image @ text.T
            positive = batch["caption_id"][:, None] == batch["caption_id"]
            mass = [side.softmax(1)[positive].unflatten(0, (12, 2)).sum(1) for side in (logits, logits.T)]
            losses.append(-torch.stack(mass).log().mean().item())
    assert metrics["val_loss"] == pytest.approx(np.mean(losses), rel=1e-5)


@pytest.mark.parametrize("step", ["training_step", "validation_step"])
def test_pictures_without_captions_are_refused_in_a_sentence(parts, step):
    module, _ = parts()
    with pytest.raises(ValueError, match="captions, and has none; set the data's captions: true"):
        getattr(module, step)({"image": torch.zeros(2, 3, 32, 32)}, 0)


@pytest.mark.filterwarnings("ignore")
def test_the_scale_is_clamped_after_a_step(parts):
    module, data = parts()
    with torch.no_grad():
        module.clip.logit_scale.fill_(9.0)
    lightning.Trainer(max_steps=5, enable_checkpointing=False, limit_val_batches=0, **QUIET).fit(module, data)
    assert module.clip.logit_scale <= torch.tensor(100.0).log()


@pytest.mark.filterwarnings("ignore")
def test_training_goes_on_with_larger_pictures(tmp_path, parts):
    module, _ = parts()
    module.clip.save(tmp_path / "small.safetensors")
    module, data = parts(weights=str(tmp_path / "small.safetensors"), image_size=48)
    data.preprocess = module.clip.preprocess
    trainer = lightning.Trainer(max_steps=5, limit_val_batches=1, enable_checkpointing=False, **QUIET)
    trainer.fit(module, data)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = CLIPPretraining.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert again.clip.image_tower.grid == 6 and again.clip.architecture["vision_cfg"]["image_size"] == 48


def test_refused_settings(parts):
    for smoothing in (-0.1, 1.0):
        with pytest.raises(ValueError, match=f"label_smoothing {smoothing} is not in"):
            parts(label_smoothing=smoothing)
    module, data = parts(warmup_steps=9)
    with pytest.raises(ValueError, match="warmup_steps 9 is not below the run's 8 steps"):
        lightning.Trainer(max_steps=8, enable_checkpointing=False, **QUIET).fit(module, data)


class OneTrainer:
    """All of a trainer that the loss asks for."""

    def __init__(self, datamodule):
        self.datamodule, self.barebones, self.sanity_checking = datamodule, False, False


def test_the_class_term_is_cross_entropy_over_the_class_prompts(parts, monkeypatch):
    plain, data = parts()
    weighted, _ = parts(class_weight=0.5)
    monkeypatch.setattr(CLIPPretraining, "log_dict", lambda *_: None)
    weighted._trainer = OneTrainer(data)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    cosines = [
        [
            F.cosine_similarity(image, text, dim=0)
            for text in plain.clip.encode_text(plain.clip.tokenizer(TINY_CAPTIONS))
        ]
        for image in plain.clip.encode_image(batch["image"])
    ]
    logits = plain.clip.logit_scale.exp() * torch.stack([torch.stack(row) for row in cosines])
    by_hand = (logits.logsumexp(1) - logits.gather(1, batch["label"][:, None])[:, 0]).mean()
    torch.testing.assert_close(weighted.loss(batch), plain.loss(batch) + 0.5 * by_hand)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [ShardDataModule, ValidatedByClass])
def test_the_class_term_needs_classes_in_training(parts, kind):
    module, data = parts(data=kind, class_weight=1.0, warmup_steps=0)
    with pytest.raises(
        ValueError, match=r"class_weight 1.0 needs training data with classes, .* have none; set it to 0"
    ):
        lightning.Trainer(max_steps=1, enable_checkpointing=False, **QUIET).fit(module, data)


def test_a_class_term_of_negative_weight_is_refused(parts):
    with pytest.raises(ValueError, match="class_weight -1 is negative"):
        parts(class_weight=-1)
