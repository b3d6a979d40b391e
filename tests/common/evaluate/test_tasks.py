"""The three tasks: open_clip's scores, independence of batches, memory, and protocols, on made-up sources."""

import weakref

import open_clip
import pytest
import torch
from open_clip.zero_shot_classifier import build_zero_shot_classifier
from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES
from torch import nn

from common.clip import CLIP
from common.data.lookup import Captioned, Labelled, source
from common.evaluate.tasks import Settings, first, linear_probe, pictures_of, retrieval, scorer, zero_shot
from common.models import Model, OpenClip
from common.preprocess import Preprocess
from common.testing import TINY_CAPTIONS
from common.zeroshot import imagenet_names
from tests.common.data.miniature import paint
from tests.common.test_zeroshot import ARCHITECTURE


class Flat(nn.Module):
    """An image tower whose embeddings are the pictures' first pixels."""

    def encode_image(self, images):
        return images.flatten(1)[:, :6]


class Blind(Flat):
    """A tower whose projection loses what its features show."""

    def encode_image(self, images):
        return torch.ones(len(images), 6)

    def penultimate(self, images):
        return images.flatten(1)[:, :6]


def of(images, texts=None):
    return Model("made-up", "CLIP", Preprocess(32), images, texts, {"image": "i", "text": "t"}, {})


@pytest.fixture(autouse=True)
def runs(tmp_path, monkeypatch):
    monkeypatch.setenv("EFFCLIP_RUNS", str(tmp_path))


def pictures(images, labels=None):
    """A loader over tensors."""

    def loader(preprocess, batch_size, workers):
        for start in range(0, len(images), batch_size):
            rows = slice(start, start + batch_size)
            batch = {"image": images[rows], "key": [str(i) for i in range(len(images))[rows]]}
            yield batch if labels is None else batch | {"label": labels[rows]}

    return loader


def labelled(samples, seed=0, classes=4, noise=0.3, size=32):
    """Noisy pictures, one corner of the first six pixels a class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(samples) % classes
    images = torch.randn(samples, 3, size, size, generator=generator)
    images[:, 0, 0, :6] = 3 * torch.eye(6)[labels] + noise * images[:, 0, 0, :6]
    names = ["red cat", "green dog", "blue bird", "cat"][:classes]
    return Labelled("test", names, ["a {}"], "accuracy", pictures(images, labels))


@torch.no_grad()
@pytest.mark.parametrize("wrapped", [False, True])
def test_scores_equal_open_clips(wrapped):
    theirs = open_clip.CLIP(**ARCHITECTURE).eval()
    open_clip.model.set_model_preprocess_cfg(theirs, vars(open_clip.transform.PreprocessCfg()))
    tokenizer = open_clip.get_tokenizer("ViT-B-16")
    if wrapped:
        ours = OpenClip(theirs, tokenizer).eval()
    else:
        ours = CLIP(ARCHITECTURE).eval()
        ours.load_weights(theirs.state_dict())
    names, prompts = list(imagenet_names()[:17]), OPENAI_IMAGENET_TEMPLATES[:5]
    images = torch.randn(3, 3, 32, 32)
    classes = build_zero_shot_classifier(theirs, tokenizer, names, prompts)
    expected = theirs.encode_image(images, normalize=True) @ classes
    templates = [prompt("{}") for prompt in prompts]
    for _ in range(2):  # the second time from the cache
        result = scorer(of(ours, ours), names, templates, Settings())(images)
        torch.testing.assert_close(result, expected, atol=1e-5, rtol=0)


def test_zero_shot_does_not_depend_on_the_batch_size():
    clip, source = CLIP.tiny().eval(), labelled(37)
    result = [zero_shot(of(clip, clip), source, source.templates, Settings(batch_size=size)) for size in (1, 5, 64)]
    assert result[0] == result[1] == result[2]
    assert result[0]["samples"] == 37 and 0 <= result[0]["top1"] <= result[0]["top5"] == 1
    part = zero_shot(of(clip, clip), source, source.templates, Settings(batch_size=8, limit=13))
    assert part["samples"] == 13


def test_a_limit_reads_the_drawn_pictures_of_a_folder(tmp_path):
    for place in range(12):
        paint(tmp_path / ("cat" if place < 6 else "dog") / f"{place:02}.png", place)
    clip, found = CLIP.tiny().eval(), source(str(tmp_path), "zeroshot")
    batches = list(pictures_of(of(clip, clip), found, Settings(batch_size=2, workers=0, limit=5)))
    assert torch.cat([batch["label"] for batch in batches]).tolist() == [int(place >= 6) for place in found.drawn(5)]


def test_ten_thousand_pictures_do_not_stay_in_memory():
    clip, alive, most = CLIP.tiny().eval(), [], 0

    def loader(preprocess, batch_size, workers):
        nonlocal most
        for _ in range(10_000 // batch_size):
            images = torch.randn(batch_size, 3, 32, 32)
            alive.append(weakref.ref(images))
            yield {"image": images, "label": torch.zeros(batch_size, dtype=torch.long), "key": [""] * batch_size}
            most = max(most, sum(ref() is not None for ref in alive))

    source = Labelled("test", ["cat", "dog"], ["a {}"], "accuracy", loader)
    assert zero_shot(of(clip, clip), source, source.templates, Settings(batch_size=250))["samples"] == 10_000
    assert most <= 2


def test_lower_precision_is_near_and_embeddings_stay_float32():
    clip, source = CLIP.tiny().eval(), labelled(16)
    images = next(iter(source.loader(Preprocess(32), 16, 0)))["image"]
    full, half = (
        scorer(of(clip, clip), source.class_names, source.templates, Settings(dtype=dtype))(images)
        for dtype in ("float32", "bfloat16")
    )
    assert half.dtype == torch.float32 and not torch.equal(full, half)
    torch.testing.assert_close(full, half, atol=0.03, rtol=0)


def test_retrieval_of_pairs_that_belong_together():
    torch.manual_seed(0)
    clip = CLIP.tiny().eval()
    captions = [[caption, f"{caption} on the cat"] for caption in TINY_CAPTIONS]
    source = Captioned("retrieval", captions, pictures(torch.randn(6, 3, 32, 32)))
    result = retrieval(of(clip, clip), source, Settings(batch_size=4))
    assert (result["samples"], result["texts"]) == (6, 12)
    for side in ("image_to_text", "text_to_image"):
        low, high = result[side]["interval"]
        assert low <= result[side]["R@1"] <= high
    assert result["text_to_image"]["R@10"] == 1, "of six pictures"
    assert retrieval(of(clip, clip), source, Settings(limit=4))["texts"] == 8
    short = Captioned("retrieval", captions[:5], source.loader)
    with pytest.raises(ValueError, match="6 pictures were read, but 5 have captions"):
        retrieval(of(clip, clip), short, Settings())


@pytest.mark.parametrize("with_val", [True, False])
def test_probe_of_separable_features(with_val):
    training = {"train": labelled(80, seed=1)} | ({"val": labelled(24, seed=2)} if with_val else {})
    result = linear_probe(of(Flat()), labelled(40, seed=3), training, [1, 8, "full"], 2, Settings(batch_size=7))
    sizes = (80, 24) if with_val else (64, 16)
    assert (result["samples"], result["train_samples"], result["val_samples"]) == (40, *sizes)
    assert result["shots"]["full"]["top1"] == result["shots"]["8"]["mean_per_class"] == 1
    assert len(result["shots"]["1"]["draws"]) == 2 and result["shots"]["1"]["deviation"] >= 0
    assert result["shots"]["full"]["gradient"] < 1e-3


def test_probe_refuses_more_shots_than_there_are():
    training = {"train": labelled(14, seed=1), "val": labelled(8, seed=2)}
    with pytest.raises(ValueError, match="class 2 has 3 training samples, fewer than 4 shots"):
        linear_probe(of(Flat()), labelled(8), training, [4], 1, Settings())


def test_first_samples():
    batches = list(labelled(20).loader(Preprocess(32), 8, 0))
    cut = list(first(batches, 11))
    assert [len(batch["image"]) for batch in cut] == [8, 3]
    assert cut[1]["key"] == ["8", "9", "10"] and torch.equal(cut[1]["label"], batches[1]["label"][:3])
    assert len(list(first(batches, 8))) == 1 and len(list(first(batches, None))) == 3


@pytest.mark.parametrize(("name", "wrong"), [("dtype", "int8"), ("limit", 0), ("batch_size", 0), ("workers", -1)])
def test_settings_are_checked(name, wrong):
    with pytest.raises(ValueError, match=f"{name} '?{wrong}"):
        Settings(**{name: wrong})


def test_a_probe_can_read_what_is_before_the_projection():
    training = {"train": labelled(40, seed=1)}
    embedding, penultimate = (
        linear_probe(of(Blind()), labelled(40), training, ["full"], 1, Settings(), features)["shots"]["full"]["top1"]
        for features in ("embedding", "penultimate")
    )
    assert embedding == 0.25 and penultimate > 0.9
    with pytest.raises(ValueError, match="gives embeddings alone"):
        linear_probe(of(Flat()), labelled(40), training, ["full"], 1, Settings(), "penultimate")


@torch.no_grad()
def test_a_clips_penultimate_feature_is_projected_to_its_embedding():
    clip, images = CLIP.tiny().eval(), torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(
        clip.penultimate(images) @ clip.image_tower.proj, clip.encode_image(images, normalize=False)
    )
