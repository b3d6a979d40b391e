"""Every row of Table 2, filled from a miniature ImageNet and random weights, against open_clip."""

import copy
from dataclasses import replace

import numpy as np
import open_clip
import pytest
import torch
from open_clip.zero_shot_classifier import build_zero_shot_classifier
from PIL import Image
from tests.benchmarks.test_baselines import SMALL_TEXT, released_tinyclip
from timm.data import ImageNetInfo

from benchmarks.waveclip import imagenet
from benchmarks.waveclip.imagenet import ImageNetValidation, imagenet_classes, row_accuracies
from benchmarks.waveclip.rivals import BASELINES, TEACHER, WAVECLIP, tinyclip_architecture, weights_file
from benchmarks.waveclip.table2 import paper
from common.zeroshot import IMAGENET_NAMES, PHOTO, similarity
from waveclip.gating import MarginGate
from waveclip.progressive import ProgressiveClassifier
from waveclip.tower import WaveTower

WNIDS = ImageNetInfo("imagenet-1k").label_names()


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
    """(root, weights folder, {row: open_clip's scores of the pictures in key order}, WaveTower, teacher)."""
    root = tmp_path_factory.mktemp("imagenet")
    generator = np.random.default_rng(0)
    pictures = []
    for index in range(16):
        pixels = generator.integers(0, 256, (6, 5, 3), dtype=np.uint8)
        pictures.append(Image.fromarray(pixels).resize((90, 75 + index), Image.Resampling.BICUBIC))
        pictures[-1].save(root / f"{index}.JPEG")
    weights = tmp_path_factory.mktemp("weights")
    scores, teacher = {}, None
    for name, row in small_rows.items():
        model = theirs(row)
        state = model.state_dict()
        torch.save(released_tinyclip(model) if name.startswith("tinyclip") else state, weights / f"{name}.pt")
        classifier = build_zero_shot_classifier(
            model, open_clip.get_tokenizer("ViT-B-16"), IMAGENET_NAMES, ["a photo of a {}."], 100
        )
        images = torch.stack([row.transform()(Image.open(root / f"{i}.JPEG")) for i in range(16)])
        with torch.no_grad():
            scores[name] = model.encode_image(images, normalize=True) @ classifier
    teacher = small_rows[TEACHER].build(weights / f"{TEACHER}.pt")
    wave = WaveTower.from_image_tower(teacher.image_tower, levels=1).eval()
    wave.save(weights / f"{WAVECLIP}.safetensors", teacher.architecture)
    return root, weights, scores, wave, teacher


def sort_into_folders(root, scores):
    """Each picture goes where one of the rows guesses it to be, so that every row has something right."""
    names = list(scores)
    for index in range(16):
        label = int(scores[names[index % len(names)]][index].argmax())
        folder = root / "val" / WNIDS[label]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{index}.JPEG").write_bytes((root / f"{index}.JPEG").read_bytes())


def test_every_row_is_filled(filled, small_rows, monkeypatch):
    monkeypatch.setattr(imagenet, "BASELINES", small_rows)
    root, weights, scores, wave, teacher = filled
    sort_into_folders(root, scores)
    rows = paper()["table2"]
    found = row_accuracies(rows, root, weights, templates=PHOTO, batch_size=5, workers=0)
    data = ImageNetValidation(root, small_rows[TEACHER].transform())
    numbers = [int(item["key"].split("/")[1].split(".")[0]) for item in data]
    labels = torch.tensor([item["label"] for item in data])
    assert len(rows) == len(found) == 10
    for row, result in zip(rows, found, strict=True):
        assert result["images"] == 16
        if row["model"] != WAVECLIP:
            right = scores[row["model"]][numbers].argmax(-1) == labels
            assert right.any()
            assert result["top1"] == pytest.approx(100 * right.float().mean().item())
            assert result["interval"][0] < result["top1"] < result["interval"][1]
    images = torch.stack([item["image"] for item in data])
    classes = imagenet_classes(teacher, PHOTO)
    for row, result in zip(rows, found, strict=True):
        if row["model"] == WAVECLIP:
            gate = MarginGate(result["threshold"])
            answer = ProgressiveClassifier(wave, classes, teacher.logit_scale.exp(), gate)(images)
            assert result["top1"] == pytest.approx(100 * (answer.scores.argmax(-1) == labels).float().mean().item())
            assert (answer.exit_step == 1).float().mean().item() == result["refined"] == round(16 * row["refined"]) / 16


def test_scores_equal_open_clips(filled, small_rows):
    root, weights, scores, _, _ = filled
    for name, row in small_rows.items():
        model = row.build(weights_file(weights, name))
        images = torch.stack([row.transform()(Image.open(root / f"{i}.JPEG")) for i in range(16)])
        with torch.no_grad():
            found = similarity(model.encode_image(images), imagenet_classes(model, PHOTO))
        torch.testing.assert_close(found, scores[name], atol=1e-4, rtol=0)


def test_missing_files(filled, small_rows, monkeypatch, tmp_path):
    monkeypatch.setattr(imagenet, "BASELINES", small_rows)
    root, weights, scores, _, _ = filled
    sort_into_folders(root, scores)
    rows = paper()["table2"]
    with pytest.raises(ValueError, match="has no file for any row; name them tinyclip-vit-8m-16"):
        row_accuracies(rows, root, tmp_path)
    (tmp_path / f"{WAVECLIP}.safetensors").symlink_to(weights / f"{WAVECLIP}.safetensors")
    with pytest.raises(ValueError, match="needs its teacher's text tower"):
        row_accuracies(rows, root, tmp_path, PHOTO, workers=0)
    (tmp_path / f"{WAVECLIP}.safetensors").unlink()
    (tmp_path / "mobileclip-b.pt").symlink_to(weights / "mobileclip-b.pt")
    found = row_accuracies(rows, root, tmp_path, PHOTO, workers=0)
    assert [result is not None for result in found] == [row["model"] == "mobileclip-b" for row in rows]


def test_unusable_trees(tmp_path):
    with pytest.raises(ValueError, match="is no folder"):
        ImageNetValidation(tmp_path / "nowhere", lambda image: image)
    (tmp_path / "ILSVRC2012_val_00000001.JPEG").touch()
    with pytest.raises(ValueError, match="sort the validation pictures"):
        ImageNetValidation(tmp_path, lambda image: image)
    (tmp_path / "val" / WNIDS[7]).mkdir(parents=True)
    with pytest.raises(ValueError, match="hold no pictures"):
        ImageNetValidation(tmp_path, lambda image: image)
    (tmp_path / "val" / "cats").mkdir()
    with pytest.raises(ValueError, match="cats"):
        ImageNetValidation(tmp_path, lambda image: image)
