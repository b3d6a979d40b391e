"""Checkpoints become committed weights with a card."""

import json

import pytest
import torch
from lightning.pytorch import Trainer

from benchmarks.training import export, run
from common.clip import CLIP
from common.data.embedded.shapes import ATTRIBUTION
from common.pretraining import CLIPPretraining
from common.testing import tiny_architecture
from mlip import Guide
from mlip.guide_mae import GuideMAE
from waveclip import WaveCLIPDistillation, WaveTower

CONDITIONS = {
    "clean": True,
    "seed": 0,
    "revision": "abc",
    "date": "2026",
    "device": "CPU",
    "threads": 2,
    "torch": "2",
}
RESULT = {
    "name": "teacher",
    "command": "lightning fit",
    "conditions": CONDITIONS,
    "minutes": 29.6,
    "steps": 3000,
    "names": 1291,
}


def saved(module, path):
    """A checkpoint as `lightning fit` writes it."""
    trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", enable_model_summary=False)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(path)


def test_checkpoint_becomes_weights(tmp_path):
    architecture = tiny_architecture(tmp_path)
    teacher = CLIPPretraining(architecture)
    saved(teacher, tmp_path / "teacher.ckpt")
    export.save(
        export.from_checkpoint(tmp_path / "teacher.ckpt", "common/shapes_clip.yaml"),
        tmp_path / "t.safetensors",
    )
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = teacher.clip.eval().encode_image(images)
        torch.testing.assert_close(
            CLIP.load(tmp_path / "t.safetensors").eval().encode_image(images), expected, atol=5e-3, rtol=0
        )
        student = WaveCLIPDistillation(architecture, weights=str(tmp_path / "t.safetensors"))
        saved(student, tmp_path / "student.ckpt")
        module = export.from_checkpoint(tmp_path / "student.ckpt", "waveclip/shapes.yaml")
        export.save(module, tmp_path / "w.safetensors")
        loaded = WaveTower.load(tmp_path / "w.safetensors").eval()
        torch.testing.assert_close(
            loaded.encode_image(images), student.wave.eval().encode_image(images), atol=5e-3, rtol=0
        )


def test_a_guides_checkpoint_becomes_its_encoder_and_its_card_states_the_loss(tmp_path, monkeypatch):
    module = GuideMAE()
    saved(module, tmp_path / "guide.ckpt")
    path = tmp_path / "guide.safetensors"
    loaded = export.from_checkpoint(tmp_path / "guide.ckpt", "mlip/guide_shapes.yaml")
    export.save(loaded, path)
    images = torch.randn(3, 3, 48, 48)
    torch.testing.assert_close(Guide.from_weights(str(path))(images), module.guide(images), atol=2e-2, rtol=0)
    batches = [{"image": images[:2]}, {"image": images[2:]}]
    monkeypatch.setattr(run.EmbeddedDataModule, "dataloader", lambda self, split: batches)
    losses = run.reconstruction(loaded, "mlip/guide_shapes.yaml")
    first, second = (
        module.loss(part, torch.Generator().manual_seed(place)) for place, part in enumerate((images[:2], images[2:]))
    )
    assert losses["val"]["masked patches"]["loss"] == pytest.approx(float(2 * first + second) / 3, rel=1e-5)
    assert "mean squared error" in export.card(path, RESULT | losses, ATTRIBUTION)


def test_card_says_where_the_weights_come_from(tmp_path):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"0" * 1000)
    accuracy = {"top1": {"accuracy": 0.61, "interval": [0.6, 0.62], "pictures": 20656}}
    text = export.card(path, json.loads(json.dumps(RESULT | {"val": accuracy, "test": accuracy})), ATTRIBUTION)
    for words in (
        "lightning fit",
        "abc (clean tree)",
        "61.00 % [60.00, 62.00] of 20,656",
        "CC-BY 4.0",
        "CLDR",
    ):
        assert words in text
