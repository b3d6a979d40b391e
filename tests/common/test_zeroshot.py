import open_clip
import pytest
import torch
from open_clip.zero_shot_classifier import build_zero_shot_classifier
from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES
from torch.nn import functional as F

from common.clip import CLIP
from common.zeroshot import class_embeddings, fill, imagenet_names, imagenet_templates, similarity

ARCHITECTURE = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 64, "layers": 1, "head_width": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}


@pytest.mark.parametrize("templates", [OPENAI_IMAGENET_TEMPLATES[:5], OPENAI_IMAGENET_TEMPLATES[:1]])
def test_equals_open_clips_classifier(templates):
    theirs = open_clip.CLIP(**ARCHITECTURE).eval()
    ours = CLIP(ARCHITECTURE).eval()
    ours.load_weights(theirs.state_dict())
    names = list(imagenet_names()[:23])
    expected = build_zero_shot_classifier(theirs, open_clip.get_tokenizer("ViT-B-16"), names, templates).T
    prompts = [template("{}") for template in templates]
    for batch_size in (1, 7, 512):
        classes = class_embeddings(ours.text_tower, ours.tokenizer, names, prompts, batch_size)
        torch.testing.assert_close(classes, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(classes.norm(dim=-1), torch.ones(23))
    images = torch.randn(3, 32)
    torch.testing.assert_close(
        similarity(images, classes), torch.cosine_similarity(images[:, None], classes[None], dim=-1)
    )


def test_imagenet_names_and_prompts():
    assert len(imagenet_names()) == 1000
    assert (imagenet_names()[0], imagenet_names()[-1]) == ("tench", "toilet paper")
    assert len(imagenet_templates()) == 80
    assert imagenet_templates()[0].replace("{}", "tench") == OPENAI_IMAGENET_TEMPLATES[0]("tench")


def test_bad_prompts_are_refused():
    clip = CLIP.tiny()
    with pytest.raises(ValueError, match=r"no \{\} for the class name"):
        class_embeddings(clip.text_tower, clip.tokenizer, ["cat"], ["a cat"])
    with pytest.raises(ValueError, match="0 class names"):
        class_embeddings(clip.text_tower, clip.tokenizer, [])


def test_a_template_can_ask_for_the_article():
    assert fill("a photo of {a} {}.", "apple") == "a photo of an apple."
    assert fill("{a} {} and {a} {}", "Egg") == "an Egg and an Egg"
    assert fill("{a} {}", "unicorn") == "a unicorn" and fill("the {}", "hourglass") == "the hourglass"


@pytest.mark.parametrize("noun", ["university", "European", "user", "utensil", "one way street", "UFO", "hotel"])
def test_what_sounds_like_a_consonant_has_a(noun):
    assert fill("{a} {}", noun) == f"a {noun}"


@pytest.mark.parametrize(
    "noun", ["hour", "honest man", "heirloom", "umbrella", "unimportant day", "X-ray", "FBI agent"]
)
def test_what_sounds_like_a_vowel_has_an(noun):
    assert fill("{a} {}", noun) == f"an {noun}"


def test_a_blank_name_has_no_article():
    with pytest.raises(ValueError, match="' ' is no noun"):
        fill("{a} {}", " ")


def test_a_name_with_an_article_is_given_no_second_one():
    assert fill("a photo of a {}.", "an apple") == fill("a photo of {a} {}.", "an apple") == "a photo of an apple."
    assert fill("the {}", "The Hague") == "The Hague" and fill("{}", "a beach") == "a beach"
    assert fill("{a} red {}", "a car") == "a red car" and fill("a {}", "android") == "a android"


def test_a_name_leaves_its_article_where_other_words_stand_between():
    assert fill("a photo of a clean {}.", "a beach") == "a photo of a clean beach."
    assert fill("a photo of my {}.", "a beach") == "a photo of my beach."
    assert fill("the plastic {}", "the Eiffel Tower") == "the plastic Eiffel Tower"
    assert fill("a photo showing {}", "a beach") == "a photo showing a beach", "there it begins anew"


@pytest.mark.parametrize("template", imagenet_templates())
def test_no_template_of_the_ensemble_gives_a_second_article(template):
    expected = {fill(template, "beach")}
    for direct in ("a {}", "an {}", "the {}"):
        if f" {direct}" in f" {template}":
            expected.add(template.replace(direct, "a beach"))
    assert fill(template, "a beach") in expected


def test_similarity_is_fp32_under_autocast():
    torch.manual_seed(0)
    z, classes = torch.randn(64, 32), F.normalize(torch.randn(200, 32), dim=-1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cosines = similarity(z, classes)
    assert cosines.dtype == torch.float32
    torch.testing.assert_close(cosines, F.cosine_similarity(z[:, None], classes[None], dim=-1))
