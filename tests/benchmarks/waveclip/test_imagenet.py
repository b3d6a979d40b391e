"""Every row of Table 2, filled from a miniature ImageNet and random weights, against open_clip."""

import copy
from dataclasses import asdict, replace

import numpy as np
import open_clip
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from open_clip.zero_shot_classifier import build_zero_shot_classifier
from PIL import Image

from benchmarks.printed import paper_numbers
from benchmarks.waveclip import imagenet
from benchmarks.waveclip.imagenet import imagenet_classes, row_accuracies, validation_images
from benchmarks.waveclip.rivals import BASELINES, TEACHER, WAVECLIP, tinyclip_architecture, weights_file
from common.data.classification import ClassificationSet
from common.data.sources import Samples
from common.preprocess import Preprocess
from common.zeroshot import PHOTO, imagenet_names, similarity
from tests.benchmarks.waveclip.test_rivals import SMALL_TEXT, released_tinyclip
from waveclip.gating import MarginGate
from waveclip.progressive import ProgressiveClassifier
from waveclip.tower import WaveTower

ROWS = paper_numbers("waveclip")["table2"]


@pytest.fixture(scope="module")
def small_rows():
    """The table's rows with smaller towers; TinyCLIP 8M/16's image tower in its real size."""
    rows = dict(BASELINES)
    for name, row in BASELINES.items():
        architecture = copy.deepcopy(row.architecture)
        if "timm_model_name" in architecture["vision_cfg"]:
            trunk, size = ("fastvit_mci0", 64) if name == "mobileclip-s2" else ("vit_tiny_patch16_224", 224)
            architecture["vision_cfg"] |= {"timm_model_name": trunk, "image_size": size}
            architecture["text_cfg"] |= SMALL_TEXT
        elif name == "tinyclip-vit-8m-16":
            architecture["text_cfg"] |= SMALL_TEXT
        else:
            quick = {"quick_gelu": architecture["quick_gelu"]} if "quick_gelu" in architecture else {}
            architecture = tinyclip_architecture(2, 64, 1, 64) | quick
            architecture["vision_cfg"]["image_size"] = 64
        rows[name] = replace(row, architecture=architecture)
    return rows


def theirs(row):
    """The row as open_clip builds it, with random weights that separate pictures and classes."""
    torch.manual_seed(3)
    keys = ("embed_dim", "vision_cfg", "text_cfg")
    family = open_clip.CustomTextCLIP if "timm_model_name" in row.architecture["vision_cfg"] else open_clip.CLIP
    return family(
        **{key: row.architecture[key] for key in keys}, quick_gelu=row.architecture.get("quick_gelu", False)
    ).eval()


@pytest.fixture(scope="module")
def filled(small_rows, tmp_path_factory):
    """(pictures, weights folder, {row: open_clip's scores of the pictures in their order}, WaveTower, teacher)."""
    generator = np.random.default_rng(0)
    pictures = []
    for index in range(16):
        pixels = generator.integers(0, 256, (6, 5, 3), dtype=np.uint8)
        pictures.append(Image.fromarray(pixels).resize((90, 75 + index), Image.Resampling.BICUBIC))
    weights = tmp_path_factory.mktemp("weights")
    scores, teacher = {}, None
    for name, row in small_rows.items():
        model = theirs(row)
        state = model.state_dict()
        torch.save(released_tinyclip(model) if name.startswith("tinyclip") else state, weights / f"{name}.pt")
        classifier = build_zero_shot_classifier(
            model, open_clip.get_tokenizer("ViT-B-16"), imagenet_names(), ["a photo of a {}."], 100
        )
        settings = PreprocessCfg(**asdict(replace(row.foreign or Preprocess(), size=row.image_size)))
        transform = image_transform_v2(settings, is_train=False)
        with torch.no_grad():
            images = torch.stack([transform(picture) for picture in pictures])
            scores[name] = model.encode_image(images, normalize=True) @ classifier
    teacher = small_rows[TEACHER].build(weights / f"{TEACHER}.pt")
    wave = WaveTower.from_image_tower(teacher.image_tower, levels=1).eval()
    wave.save(weights / f"{WAVECLIP}.safetensors", teacher.architecture)
    return pictures, weights, scores, wave, teacher


@pytest.fixture
def labelled(filled, monkeypatch):
    """The pictures as ImageNet's; each has the label that one of the rows guesses, so every row has something right."""
    pictures, _, scores, _, _ = filled
    names = list(scores)
    labels = [int(scores[names[index % len(names)]][index].argmax()) for index in range(16)]
    samples = Samples([np.asarray(picture) for picture in pictures], labels, list(imagenet_names()))
    images = ClassificationSet(samples, "imagenet", imagenet_names())
    monkeypatch.setattr(imagenet, "validation_images", lambda root: images)
    return torch.tensor(labels)


def test_every_row_is_filled(filled, small_rows, labelled, monkeypatch):
    monkeypatch.setattr(imagenet, "BASELINES", small_rows)
    pictures, weights, scores, wave, teacher = filled
    results = row_accuracies(ROWS, "imagenet", weights, templates=PHOTO, batch_size=5, workers=0)
    assert len(ROWS) == len(results) == 10
    for row, result in zip(ROWS, results, strict=True):
        assert result["images"] == 16
        if row["model"] != WAVECLIP:
            right = scores[row["model"]].argmax(-1) == labelled
            assert right.any()
            assert result["top1"] == pytest.approx(100 * right.float().mean().item())
            assert result["interval"][0] < result["top1"] < result["interval"][1]
    images = torch.stack([small_rows[TEACHER].transform()(picture) for picture in pictures])
    classes = imagenet_classes(teacher, PHOTO)
    for row, result in zip(ROWS, results, strict=True):
        if row["model"] == WAVECLIP:
            gate = MarginGate(result["threshold"])
            answer = ProgressiveClassifier(wave, classes, teacher.logit_scale.exp(), gate)(images)
            right = answer.scores.argmax(-1) == labelled
            assert result["top1"] == pytest.approx(100 * right.float().mean().item())
            assert (answer.exit_step == 1).float().mean().item() == result["refined"] == round(16 * row["refined"]) / 16


def test_scores_equal_open_clips(filled, small_rows):
    pictures, weights, scores, _, _ = filled
    for name, row in small_rows.items():
        model = row.build(weights_file(weights, name))
        images = torch.stack([row.transform()(picture) for picture in pictures])
        with torch.no_grad():
            ours = similarity(model.encode_image(images), imagenet_classes(model, PHOTO))
        torch.testing.assert_close(ours, scores[name], atol=1e-4, rtol=0)


def test_missing_files(filled, small_rows, labelled, monkeypatch, tmp_path):
    monkeypatch.setattr(imagenet, "BASELINES", small_rows)
    _, weights, _, _, _ = filled
    with pytest.raises(ValueError, match="has no file for any row; name them tinyclip-vit-8m-16"):
        row_accuracies(ROWS, "imagenet", tmp_path)
    (tmp_path / f"{WAVECLIP}.safetensors").symlink_to(weights / f"{WAVECLIP}.safetensors")
    with pytest.raises(ValueError, match="needs its teacher's text tower"):
        row_accuracies(ROWS, "imagenet", tmp_path, PHOTO, workers=0)
    (tmp_path / f"{WAVECLIP}.safetensors").unlink()
    (tmp_path / "mobileclip-b.pt").symlink_to(weights / "mobileclip-b.pt")
    results = row_accuracies(ROWS, "imagenet", tmp_path, PHOTO, workers=0)
    assert [result is not None for result in results] == [row["model"] == "mobileclip-b" for row in ROWS]


def test_an_incomplete_tree_says_what_it_needs(tmp_path):
    with pytest.raises(ValueError, match=r"IMAGENET=.*nowhere.* no such folder.* sorted into imagenet/train"):
        validation_images(tmp_path / "nowhere")
    (tmp_path / "val" / "n01440764").mkdir(parents=True)
    (tmp_path / "val" / "n01440764" / "ILSVRC2012_val_00000293.JPEG").touch()
    for root in (tmp_path, tmp_path / "val"):
        with pytest.raises(ValueError, match=r"1 folders .*which are not the classes of imagenet-1k"):
            validation_images(root)
