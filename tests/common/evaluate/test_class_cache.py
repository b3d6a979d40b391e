"""The cache finds class embeddings by their content alone."""

from functools import partial

import pytest
import torch

from common.clip import CLIP
from common.evaluate import class_cache
from common.evaluate.class_cache import cache_key, cached_class_embeddings
from common.tokenizer import Tokenizer
from common.zeroshot import class_embeddings

NAMES, TEMPLATES = ["cat", "dog", "red bird"], ["a {}", lambda name: f"the {name} on the cat"]


def test_computed_once_and_equal(tmp_path, monkeypatch):
    clip = CLIP.tiny().eval()
    tokenizer = partial(clip.tokenizer, longest=True)
    expected = class_embeddings(clip.text_tower, tokenizer, NAMES, TEMPLATES)
    torch.testing.assert_close(cached_class_embeddings(clip, "w", NAMES, TEMPLATES, tmp_path), expected)
    (file,) = tmp_path.iterdir()
    monkeypatch.setattr(class_cache, "class_embeddings", lambda *_, **__: pytest.fail("computed again"))
    torch.testing.assert_close(cached_class_embeddings(clip, "w", NAMES, TEMPLATES, tmp_path), expected)
    assert list(tmp_path.iterdir()) == [file], "nothing unfinished stays behind"


@pytest.mark.parametrize("damage", [lambda whole: b"", lambda whole: whole[:-9], lambda whole: b"\xff" * len(whole)])
def test_a_damaged_file_is_computed_anew_and_written_over(tmp_path, damage):
    clip = CLIP.tiny().eval()
    expected = cached_class_embeddings(clip, "w", NAMES, TEMPLATES, tmp_path)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    torch.testing.assert_close(cached_class_embeddings(clip, "w", NAMES, TEMPLATES, tmp_path), expected)
    assert file.read_bytes() == whole


def test_default_folder_is_in_the_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("EFFCLIP_RUNS", str(tmp_path))
    cached_class_embeddings(CLIP.tiny().eval(), "w", NAMES, TEMPLATES)
    assert len(list((tmp_path / "class_embeddings").glob("*.safetensors"))) == 1


def test_key_follows_weights_vocabulary_names_and_templates():
    architecture = CLIP.tiny().architecture["text_cfg"]
    kept = architecture["vocabulary"]
    tokenizer = Tokenizer(16, kept)
    keys = [
        cache_key("w", tokenizer, NAMES, TEMPLATES),
        cache_key("v", tokenizer, NAMES, TEMPLATES),
        cache_key("w", tokenizer, NAMES[:2], TEMPLATES),
        cache_key("w", tokenizer, NAMES[::-1], TEMPLATES),
        cache_key("w", tokenizer, NAMES, TEMPLATES[:1]),
        cache_key("w", tokenizer, NAMES, ["the {}", TEMPLATES[1]]),
        cache_key("w", Tokenizer(16), NAMES, TEMPLATES),
        cache_key("w", Tokenizer(15, kept), NAMES, TEMPLATES),
    ]
    assert len(set(keys)) == len(keys)
    assert cache_key("w", Tokenizer(16, kept), list(NAMES), tuple(TEMPLATES)) == keys[0]
    # One template of two names and two templates of one name can be the same list of prompts.
    two_names = cache_key("w", tokenizer, ["a cat", "a dog"], ["{}"])
    assert two_names != cache_key("w", tokenizer, ["cat"], ["a {}", lambda name: "a dog"])
