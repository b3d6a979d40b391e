"""Sets that CLIP_benchmark exported: names, templates and labels as they stand there, and its own numbers."""

import io
import os

import numpy as np
import open_clip
import pytest
import torch
import webdataset
from PIL import Image
from torch.nn import functional as F

from common.clip import CLIP
from common.data.lookup import source, splits_of
from common.data.packing import write_tar
from common.evaluate.tasks import Settings, zero_shot
from common.models import Model
from common.preprocess import Preprocess
from tests.common.test_zeroshot import ARCHITECTURE

NAMES = ["cat", "dog", "fire truck", "sea", "tree", "house"]


def picture(seed):
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((40, 30), Image.Resampling.BICUBIC).save(file, "WEBP", lossless=True)
    return file.getvalue()


@pytest.fixture
def folder(tmp_path):
    """30 pictures in two shards, as clip_benchmark_export_wds writes them."""
    folder = tmp_path / "wds"
    (folder / "test").mkdir(parents=True)
    (folder / "classnames.txt").write_text("\n".join(NAMES))
    (folder / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.\na {c}")
    (folder / "test" / "nshards.txt").write_text("2")
    for shard in range(2):
        numbers = range(15 * shard, 15 * shard + 15)
        samples = ({"__key__": f"s{n:07d}", "webp": picture(n), "cls": str(n % 6).encode()} for n in numbers)
        write_tar(folder / "test" / f"{shard}.tar", samples)
    return folder


def test_what_the_folder_says(folder):
    assert splits_of(f"webdataset:{folder}", "zeroshot") == ("test",)
    data = source(f"webdataset:{folder}", "zeroshot")
    assert list(data.class_names) == NAMES and data.templates == ("a photo of a {}.", "a {}")
    batches = list(data.loader(Preprocess(24), 8, 0))
    assert torch.cat([batch["label"] for batch in batches]).tolist() == [n % 6 for n in range(30)]
    assert data.account.to_dict()["delivered"] == 30


def test_another_shard_is_another_version(folder):
    before = source(f"webdataset:{folder}", "zeroshot").version
    os.utime(folder / "test" / "0.tar", ns=(1, 1))
    assert source(f"webdataset:{folder}", "zeroshot").version != before


def test_what_is_missing_is_named(folder):
    (folder / "test" / "1.tar").unlink()
    with pytest.raises(ValueError, match=r"1 of 2 shards are missing, first .*1\.tar"):
        source(f"webdataset:{folder}", "zeroshot")
    (folder / "classnames.txt").unlink()
    with pytest.raises(ValueError, match=r"classnames\.txt cannot be read"):
        source(f"webdataset:{folder}", "zeroshot")
    with pytest.raises(ValueError, match="holds no exported set"):
        splits_of(f"webdataset:{folder}/test", "zeroshot")


def test_a_label_beyond_the_names_fails_the_evaluation(folder):
    write_tar(folder / "test" / "1.tar", [{"__key__": "a", "webp": picture(0), "cls": b"6"}])
    with pytest.raises(ValueError, match=r"needs a label .* below 6, has 6"):
        list(source(f"webdataset:{folder}", "zeroshot").loader(Preprocess(24), 8, 0))


def clip_benchmark(model, folder, image_size):
    """CLIP_benchmark's zero-shot numbers by its own steps, with open_clip's model, tokenizer and transform."""
    tokenizer, transform = open_clip.get_tokenizer("ViT-B-16"), open_clip.image_transform(image_size, is_train=False)
    weights = []
    for name in NAMES:
        texts = tokenizer([f"a photo of a {name}.", f"a {name}"])
        mean = F.normalize(model.encode_text(texts), dim=-1).mean(0)
        weights.append(mean / mean.norm())
    shards = webdataset.WebDataset(f"{folder}/test/{{0..1}}.tar", shardshuffle=False).decode("pil")
    images, labels = zip(*shards.to_tuple("webp", "cls"), strict=True)
    features = F.normalize(model.encode_image(torch.stack([transform(image) for image in images])), dim=-1)
    logits, labels = 100 * features @ torch.stack(weights, 1), torch.tensor(labels)
    hits = logits.topk(5).indices == labels[:, None]
    per_class = [hits[labels == label, 0].float().mean() for label in range(len(NAMES))]
    return {
        "top1": hits[:, 0].float().mean().item(),
        "top5": hits.any(1).float().mean().item(),
        "mean_per_class": torch.stack(per_class).mean().item(),
    }


@torch.no_grad()
def test_zero_shot_numbers_equal_clip_benchmarks(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("EFFCLIP_RUNS", str(tmp_path / "runs"))
    theirs = open_clip.CLIP(**ARCHITECTURE).eval()
    ours = CLIP(ARCHITECTURE).eval()
    ours.load_weights(theirs.state_dict())
    size = ARCHITECTURE["vision_cfg"]["image_size"]
    data = source(f"webdataset:{folder}", "zeroshot")
    model = Model("random", "CLIP", Preprocess(size), ours, ours, {"image": "i", "text": "t"}, {})
    metrics = zero_shot(model, data, data.templates, Settings(batch_size=7, workers=0))
    expected = clip_benchmark(theirs, folder, size)
    assert {name: pytest.approx(value) for name, value in expected.items()} == {
        name: metrics[name] for name in expected
    }
    assert 0 < metrics["top5"] < 1
