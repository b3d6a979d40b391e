"""`effclip evaluate`, classify and export on models whose pictures are not prepared as CLIP's, against open_clip."""

import json

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from common.cli import main
from common.data.lookup import source
from common.deploy.model import load
from common.models import load_model

SIZES = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
SQUASH = {"mean": [0.5] * 3, "std": [0.4] * 3, "interpolation": "bilinear", "resize_mode": "squash"}


@pytest.fixture
def model(tmp_path):
    """The folder of a random open_clip model that is trained on squashed pictures."""
    (tmp_path / "squash").mkdir()
    described = {"model_cfg": SIZES, "preprocess_cfg": SQUASH}
    (tmp_path / "squash" / "open_clip_config.json").write_text(json.dumps(described))
    torch.manual_seed(0)
    torch.save(open_clip.CLIP(**SIZES).state_dict(), tmp_path / "squash" / "open_clip_pytorch_model.bin")
    return tmp_path / "squash"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Two classes of four pictures each, wide and tall."""
    monkeypatch.setenv("EFFCLIP_RUNS", str(tmp_path / "runs"))
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "own" / name).mkdir(parents=True)
        for number, shape in enumerate(((90, 40), (33, 120), (64, 64), (20, 31))):
            pixels = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "own" / name / f"{number}.png")
    return tmp_path / "own"


@torch.no_grad()
def open_clips(model, folder):
    """open_clip's own pipeline: the pictures, their embeddings [M,E], and their cosines [M,C] with the classes."""
    clip, transform = open_clip.create_model_from_pretrained(f"local-dir:{model}")
    clip, tokenizer = clip.eval(), open_clip.get_tokenizer(f"local-dir:{model}")
    images = torch.stack([transform(Image.open(file)) for file in sorted(folder.rglob("*.png"))])
    texts = clip.encode_text(tokenizer(["a cat", "a dog"]), normalize=True)
    embeddings = clip.encode_image(images, normalize=True)
    return images, embeddings, embeddings @ texts.T


@torch.no_grad()
def test_evaluate_equals_open_clips_pipeline_to_the_bit(model, folder):
    images, embeddings, cosines = open_clips(model, folder)
    loaded, data = load_model(f"local-dir:{model}"), source(str(folder), "zeroshot")
    (batch,) = data.loader(loaded.preprocess, 8, 0)
    assert torch.equal(batch["image"], images)
    assert torch.equal(loaded.images.encode_image(batch["image"]), embeddings)
    arguments = ["--model", str(model), "--data", str(folder), "--template", "a {}", "--workers", "0"]
    assert main(["evaluate", *arguments, "--device", "cpu"]) == 0
    (file,) = (folder.parent / "runs" / "evaluations").glob("*.json")
    result, labels = json.loads(file.read_text()), torch.arange(2).repeat_interleave(4)
    assert result["metrics"]["top1"] == (cosines.argmax(1) == labels).double().mean().item()
    assert result["conditions"]["preprocess"] == {"size": 32, **SQUASH, "fill_color": 0}


def test_classify_gives_open_clips_probabilities(model, folder):
    *_, cosines = open_clips(model, folder)
    deployed = load(str(model), device="cpu")
    answers = deployed.classify(str(folder), ["cat", "dog"], templates=["a {}"], batch_size=8)
    expected = (cosines / 0.07).softmax(1)
    assert [answer.label for answer in answers] == [("cat", "dog")[place] for place in expected.argmax(1)]
    assert [answer.probability for answer in answers] == pytest.approx(expected.amax(1).tolist(), abs=1e-6)


def test_a_graph_comes_with_what_its_pictures_need(model, tmp_path, monkeypatch):
    monkeypatch.setattr("common.deploy.graphs._seconds", lambda chain, images: 0.5)
    assert main(["export", str(model), "--format", "torch-export", "--out", str(tmp_path / "graph")]) == 0
    report = json.loads((tmp_path / "graph" / "export.json").read_text())
    assert {name: report["preprocess"][name] for name in (*SQUASH, "size")} == SQUASH | {"size": 32}
    graph, images = torch.export.load(tmp_path / "graph" / "image.pt2").module(), torch.randn(3, 3, 32, 32)
    clip = open_clip.create_model(f"local-dir:{model}").eval()
    with torch.no_grad():
        torch.testing.assert_close(graph(images)[0], clip.encode_image(images, True), atol=1e-4, rtol=0)


def test_the_preprocessing_of_a_local_file_is_said_on_the_command_line(model, folder, tmp_path, capsys):
    """A file of ViT-L-14, whose tags differ."""
    (tmp_path / "small-of-two.json").write_text(json.dumps(SIZES))
    open_clip.add_model_config(tmp_path / "small-of-two.json")
    file = str(model / "open_clip_pytorch_model.bin")
    arguments = ["evaluate", "--weights", file, "--quick-gelu", "no", "--data", str(folder), "--template", "a {}"]
    assert main([*arguments, "--model", "ViT-L-14"]) == 1
    assert "say --preprocess (preprocess: in a recipe) clip, or a tag that was trained alike" in capsys.readouterr().err
    assert main([*arguments, "--model", "small-of-two", "--preprocess", "clip", "--workers", "0"]) == 0
    assert main([*arguments, "--model", "small-of-two", "--preprocess", "squash"]) == 1
    assert "preprocess 'squash' is neither clip nor a weights tag of small-of-two" in capsys.readouterr().err
