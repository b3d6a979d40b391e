"""Building a CLIP, moving weights in and out, and what is refused by name."""

import json
import pickle
import re
from pathlib import Path
from types import SimpleNamespace

import open_clip
import pytest
import torch
from open_clip.model import resize_pos_embed
from safetensors.torch import save_file

from common import pretrained
from common.clip import CLIP, load_architecture
from common.testing import tiny_architecture
from common.tokenizer import encode
from common.tower import resize_positions
from common.weights import read_record


@pytest.fixture
def architecture(tmp_path):
    return tiny_architecture(tmp_path)


def embeddings(clip):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, 32, 32, generator=generator)
    with torch.no_grad():
        return clip.encode_image(images), clip.encode_text(clip.tokenizer(["a red cat", "the dog on a bird"]))


def test_tiny():
    clip = CLIP.tiny()
    image, text = embeddings(clip)
    assert image.shape == text.shape == (2, 32)
    for z in (image, text):
        torch.testing.assert_close(z.norm(dim=-1), torch.ones(2))
    assert torch.isclose(clip.logit_scale.exp(), torch.tensor(1 / 0.07))
    assert len(clip.image_tower.transformer.resblocks) == len(clip.text_tower.transformer.resblocks) == 2
    assert clip.image_tower.transformer.resblocks[0].attn.heads == 2 and not clip.quick_gelu
    assert clip.tokenizer.context_length == 16 and sum(p.numel() for p in clip.parameters()) < 300_000


def test_save_and_load(tmp_path, architecture):
    clip = CLIP.from_open_clip(architecture, quick_gelu=True)
    clip.save(tmp_path / "new" / "a.safetensors")
    loaded = CLIP.load(tmp_path / "new" / "a.safetensors")
    assert loaded.architecture == {**clip.architecture, "quick_gelu": True} and loaded.quick_gelu
    assert loaded.state_dict().keys() == clip.state_dict().keys()
    for key, value in clip.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value)
    for result, expected in zip(embeddings(loaded), embeddings(clip), strict=True):
        assert torch.equal(result, expected)


def test_a_small_file_is_read_back_as_fp32(tmp_path):
    clip = CLIP.tiny()
    clip.save(tmp_path / "half.safetensors", torch.float16)
    loaded = CLIP.load(tmp_path / "half.safetensors")
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    for result, expected in zip(embeddings(loaded), embeddings(clip), strict=True):
        torch.testing.assert_close(result, expected, atol=5e-3, rtol=0)


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("wrapped", ["", "module.", "model.", "clip."])
def test_foreign_files_of_open_clips_keys(tmp_path, suffix, wrapped):
    text = {"context_length": 6, "vocab_size": 9, "width": 64, "heads": 2, "layers": 1}
    architecture = {**CLIP.tiny().architecture, "text_cfg": text, "quick_gelu": True}
    (tmp_path / "a.json").write_text(json.dumps(architecture))
    theirs = open_clip.CLIP(**architecture).eval()
    state = {wrapped + key: value.clone() for key, value in theirs.state_dict().items()}
    file = str(tmp_path / f"weights.{suffix}")
    if suffix == "pt":
        torch.save({"state_dict": state, "epoch": 3} if wrapped else state, file)
    else:
        save_file(state, file)
    with pytest.raises(ValueError, match="does not record its activation; say quick_gelu true or false"):
        CLIP.from_open_clip(str(tmp_path / "a.json"), file)
    ours = CLIP.from_open_clip(str(tmp_path / "a.json"), file, quick_gelu=True)
    images, ids = torch.randn(2, 3, 32, 32), torch.tensor([[7, 1, 8, 0, 0, 0]])
    with torch.no_grad():
        result, expected = ours.encode_image(images, False), theirs.encode_image(images)
        torch.testing.assert_close(result, expected, atol=1e-5, rtol=0)
        result, expected = ours.encode_text(ids, False), theirs.encode_text(ids)
        torch.testing.assert_close(result, expected, atol=1e-5, rtol=0)


def test_a_recorded_activation_needs_no_word_and_allows_no_other(tmp_path, architecture):
    file = str(tmp_path / "a.safetensors")
    CLIP.from_open_clip(architecture).save(file)
    assert not CLIP.from_open_clip(architecture, file).quick_gelu
    with pytest.raises(ValueError, match=r"trained with GELU but .* with quick_gelu=True means QuickGELU"):
        CLIP.from_open_clip(architecture, file, quick_gelu=True)


@pytest.mark.parametrize("image_size", [16, 32, 56])
def test_pictures_of_another_size_take_interpolated_positions(tmp_path, architecture, image_size):
    clip, file, grid = CLIP.tiny(), str(tmp_path / "a.safetensors"), image_size // 8
    clip.save(file)
    resized = CLIP.from_open_clip(architecture, file, image_size=image_size)
    theirs = {"visual.positional_embedding": clip.image_tower.positional_embedding.detach()}
    resize_pos_embed(theirs, SimpleNamespace(visual=SimpleNamespace(grid_size=(grid, grid))))
    (expected,) = theirs.values()
    torch.testing.assert_close(resized.image_tower.positional_embedding.detach(), expected)
    assert resized.architecture["vision_cfg"] == {**clip.architecture["vision_cfg"], "image_size": image_size}
    assert torch.equal(resized.image_tower.conv1.weight, clip.image_tower.conv1.weight)
    assert resized.encode_image(torch.randn(2, 3, image_size, image_size)).shape == (2, 32)


def test_weights_for_another_size_are_refused_unless_it_is_said(tmp_path, architecture):
    CLIP.from_open_clip(architecture, image_size=64).save(tmp_path / "a.safetensors")
    assert CLIP.load(tmp_path / "a.safetensors").image_tower.image_size == 64
    refused = r"has shape \(65, 64\), expected \(17, 64\); image_size interpolates positions for pictures of another"
    with pytest.raises(ValueError, match=refused):
        CLIP.from_open_clip(architecture, str(tmp_path / "a.safetensors"))
    with pytest.raises(ValueError, match="12 positions are not those of a class token and a square of patches"):
        resize_positions(torch.zeros(12, 64), 4)


def test_keys_and_shapes_that_do_not_fit_are_named():
    clip = CLIP.tiny()
    state = clip.state_dict()
    state["image_tower.extra"] = state.pop("image_tower.ln_post.bias")
    state["text_tower.text_projection"] = torch.zeros(3, 32)
    wrong = (
        "x.pt does not fit this architecture: missing image_tower.ln_post.bias; "
        "text_tower.text_projection has shape (3, 32), expected (64, 32); unknown image_tower.extra"
    )
    with pytest.raises(ValueError, match=re.escape(wrong)):
        clip.load_weights(state, "x.pt")
    with pytest.raises(ValueError, match=r"and \d+ more"):
        clip.load_weights({})


def test_an_architecture_is_found_by_name_or_file_or_refused(tmp_path, architecture):
    assert load_architecture(architecture) == CLIP.tiny().architecture
    assert load_architecture("common/embedded_clip.json")["embed_dim"] == 128
    assert CLIP.from_open_clip(architecture, quick_gelu=True).quick_gelu
    with pytest.raises(ValueError, match="'ViT-Z-99' is neither an open_clip model name nor"):
        CLIP.from_open_clip("ViT-Z-99")
    with pytest.raises(ValueError, match=f"no architecture file at {tmp_path}/none.json"):
        load_architecture(f"{tmp_path}/none.json")
    with pytest.raises(ValueError, match="MobileCLIP-S2: custom_text = True is not"):
        load_architecture("MobileCLIP-S2")


def test_an_architecture_may_say_only_what_differs_from_another(tmp_path):
    base = tiny_architecture(tmp_path)
    deeper = tmp_path / "deeper.json"
    deeper.write_text(json.dumps({"base": base, "embed_dim": 64, "vision_cfg": {"layers": 6}}))
    tiny = CLIP.tiny().architecture
    vision = {**tiny["vision_cfg"], "layers": 6}
    assert load_architecture(str(deeper)) == {**tiny, "embed_dim": 64, "vision_cfg": vision}


def test_a_vocabulary_must_have_the_stated_size():
    described = CLIP.tiny().architecture
    short = {**described, "text_cfg": {**described["text_cfg"], "vocabulary": encode("a")}}
    with pytest.raises(ValueError, match="vocab_size 12 but 3 ids kept"):
        CLIP(short)


def test_files_that_are_missing_or_unsafe(tmp_path, architecture):
    with pytest.raises(ValueError, match=f"no weights at {tmp_path}/none.pt"):
        CLIP.from_open_clip(architecture, f"{tmp_path}/none.pt", quick_gelu=False)
    fired = tmp_path / "fired"
    (tmp_path / "bad.pt").write_bytes(pickle.dumps({"state_dict": Payload(fired)}))
    with pytest.raises(ValueError, match=r"bad\.pt is no file of plain tensors"):
        CLIP.from_open_clip(architecture, f"{tmp_path}/bad.pt", quick_gelu=False)
    assert not fired.exists()
    save_file({"a": torch.zeros(1)}, tmp_path / "bare.safetensors")
    with pytest.raises(ValueError, match=r"bare\.safetensors records no architecture; use CLIP"):
        CLIP.load(tmp_path / "bare.safetensors")
    assert read_record(tmp_path / "bare.safetensors") == {}


class Payload:
    """Unpickling one of these would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize(
    ("name", "tag", "quick_gelu", "message"),
    [
        ("ViT-B-16", "laion9b", None, r"'laion9b' is no weights tag of ViT-B-16; it has \['openai', "),
        ("ViT-B-16", "openai", None, "openai was trained with QuickGELU but ViT-B-16 .* name the matching"),
        ("ViT-B-16-quickgelu", "openai", False, "openai was trained with QuickGELU but"),
        ("ViT-B-16", "laion2b_s34b_b88k", True, "laion2b_s34b_b88k was trained with GELU but"),
    ],
)
def test_a_tag_that_cannot_fit_is_refused_before_anything_is_fetched(name, tag, quick_gelu, message, monkeypatch):
    monkeypatch.setattr(pretrained, "_tag_state_dict", lambda *_: pytest.fail("fetched"))
    monkeypatch.setattr(CLIP, "__init__", None)
    with pytest.raises(ValueError, match=message):
        CLIP.from_open_clip(name, tag, quick_gelu=quick_gelu)
