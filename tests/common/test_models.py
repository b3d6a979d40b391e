"""What the commands may load: types by their registered names, open_clip's models, and refusals of the rest."""

import json

import open_clip
import pytest
import torch
from timm import create_model

from common import models
from common.clip import CLIP
from common.models import load_model, registered
from common.pretrained import tag_quick_gelu
from common.reduction import ReducedTower
from common.weights import save_model
from waveclip import WaveTower

SMALL = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 64, "layers": 1, "head_width": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1},
}


@pytest.fixture
def clip(tmp_path):
    """The tiny CLIP and the file it was saved to."""
    clip = CLIP.tiny().eval()
    clip.save(tmp_path / "tiny.safetensors")
    return clip, tmp_path / "tiny.safetensors"


@pytest.fixture
def small(tmp_path):
    """The name of a small architecture that open_clip knows, a model of it, and its weights' file."""
    (tmp_path / "evaluated-small.json").write_text(json.dumps(SMALL))
    open_clip.add_model_config(tmp_path / "evaluated-small.json")
    model = open_clip.create_model("evaluated-small").eval()
    torch.save(model.state_dict(), tmp_path / "small.pt")
    return "evaluated-small", model, str(tmp_path / "small.pt")


@torch.no_grad()
def test_a_file_or_a_folder_of_this_suite(clip, tmp_path):
    ours, file = clip
    images = torch.randn(2, 3, 32, 32)
    for where in (file, tmp_path):
        found = load_model(str(where))
        assert (found.type, found.image_size, found.name) == ("CLIP", 32, where.name.removesuffix(".safetensors"))
        assert found.weights["image"] == found.weights["text"] == found.files["tiny.safetensors"]
        torch.testing.assert_close(found.images.encode_image(images), ours.encode_image(images))
    ours.save(tmp_path / "other.safetensors", torch.float16)
    with pytest.raises(ValueError, match="has 2 safetensors files"):
        load_model(str(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no model; name a model directory or a weights file"):
        load_model(str(tmp_path / "empty"))
    assert load_model(str(tmp_path / "other.safetensors")).weights != found.weights


def test_an_image_tower_alone_borrows_a_text_tower(clip, tmp_path):
    ours, file = clip
    wave = tmp_path / "wave.safetensors"
    WaveTower.from_image_tower(ours.image_tower).save(wave, ours.architecture)
    alone = load_model(str(wave))
    assert alone.type == "wave" and alone.texts is None
    with pytest.raises(ValueError, match=r"wave .type wave. has no text tower.*--text-model"):
        alone.text_encoder()
    both = load_model(str(wave), text_model=str(file))
    assert isinstance(both.text_encoder(), CLIP) and isinstance(both.images, WaveTower)
    assert both.weights == {"image": alone.weights["image"], "text": load_model(str(file)).weights["text"]}
    assert set(both.files) == {"wave.safetensors", "tiny.safetensors"}


def test_only_registered_types_are_loaded(clip, tmp_path):
    ours, _ = clip
    file = tmp_path / "strange.safetensors"
    save_model(ours, file, {"architecture": ours.architecture, "os.system": {}}, torch.float32)
    with pytest.raises(ValueError, match=r"of type \['os.system'\]; registered are \['CLIP', .*'wave'"):
        load_model(str(file))
    assert {"CLIP", "wave"} <= registered().keys()


@torch.no_grad()
@pytest.mark.parametrize("quick_gelu", [False, True])
def test_local_weights_of_an_open_clip_model(small, quick_gelu, tmp_path):
    name, model, file = small
    theirs = open_clip.create_model(name, force_quick_gelu=quick_gelu).eval()
    theirs.load_state_dict(model.state_dict())
    found = load_model(name, file, quick_gelu)
    assert (found.type, found.image_size, found.name) == ("open_clip", 32, f"{name} small")
    images, texts = torch.randn(2, 3, 32, 32), ["a cat", "a diagram"]
    torch.testing.assert_close(found.images.encode_image(images), theirs.encode_image(images, normalize=True))
    ids = found.texts.tokenizer(texts, longest=True)
    assert torch.equal(ids, open_clip.get_tokenizer(name)(texts))
    torch.testing.assert_close(found.texts.encode_text(ids), theirs.encode_text(ids, normalize=True))
    assert found.weights != load_model(name, file, not quick_gelu).weights


@torch.no_grad()
def test_a_resnet(tmp_path):
    vision = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "patch_size": None}
    (tmp_path / "resnet-small.json").write_text(json.dumps({**SMALL, "vision_cfg": vision}))
    open_clip.add_model_config(tmp_path / "resnet-small.json")
    theirs = open_clip.create_model("resnet-small").eval()
    torch.save(theirs.state_dict(), tmp_path / "resnet.pt")
    found, images = load_model("resnet-small", f"{tmp_path}/resnet.pt", False), torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(found.images.encode_image(images), theirs.encode_image(images, normalize=True))


def test_a_file_may_lack_the_counters_of_batch_normalisation(tmp_path):
    vision = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "patch_size": None}
    (tmp_path / "resnet-old.json").write_text(json.dumps({**SMALL, "vision_cfg": vision}))
    open_clip.add_model_config(tmp_path / "resnet-old.json")
    state = open_clip.create_model("resnet-old").state_dict()
    torch.save({key: value for key, value in state.items() if "num_batches" not in key}, tmp_path / "old.pt")
    assert load_model("resnet-old", f"{tmp_path}/old.pt", False).image_size == 64


@torch.no_grad()
def test_training_branches_are_folded_without_changing_the_answers(tmp_path):
    """A FastViT, as MobileCLIP's smaller image towers are."""
    vision = {"timm_model_name": "fastvit_t8", "timm_model_pretrained": False, "timm_pool": "avg", "image_size": 64}
    config = {"embed_dim": 32, "vision_cfg": vision, "text_cfg": SMALL["text_cfg"], "custom_text": True}
    (tmp_path / "folded-small.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "folded-small.json")
    theirs, images = open_clip.create_model("folded-small"), torch.randn(4, 3, 64, 64)
    theirs.train()(images, torch.zeros(4, 77, dtype=torch.long))  # moves the batch statistics off their start
    torch.save(theirs.state_dict(), tmp_path / "folded.pt")
    ours = load_model("folded-small", f"{tmp_path}/folded.pt", False)
    assert len(ours.images.model.visual.state_dict()) < len(theirs.visual.state_dict()) / 2
    expected = theirs.eval().encode_image(images, normalize=True)
    torch.testing.assert_close(ours.images.encode_image(images), expected, atol=1e-4, rtol=0)


def test_refusals_before_anything_is_fetched(small, clip, tmp_path, monkeypatch):
    name, _, file = small
    torch.save({"visual.proj": torch.zeros(1)}, tmp_path / "wrong.pt")
    cases = {
        (f"{tmp_path}/none.safetensors",): f"no weights at {tmp_path}/none.safetensors",
        (file,): "records no architecture",
        (str(clip[1]), "openai"): "belong to open_clip names",
        ("ViT-Z-99",): "'ViT-Z-99' is no file or folder here and no open_clip model",
        ("ViT-B-16",): r"without weights is random; give --weights with one of \['openai'",
        ("ViT-B-16", "laion9b"): "'laion9b' is no weights tag of ViT-B-16",
        ("ViT-B-16", "openai"): "ViT-B-16 has GELU; name the matching one, ViT-B-16-quickgelu",
        ("roberta-ViT-B-32", file, False): "roberta-ViT-B-32 has QuickGELU .* they need another architecture",
        ("ViT-B-16-quickgelu", "openai", False): "and --quick-gelu says GELU; leave --quick-gelu out",
        (name, file): "--quick-gelu yes or no",
        (name, f"{tmp_path}/wrong.pt", False): "does not fit evaluated-small: missing ln_final.bias; missing ",
        (name, f"{tmp_path}/none.pt", False): "no weights at",
    }
    for arguments, message in cases.items():
        with pytest.raises(ValueError, match=message):
            load_model(*arguments)


@torch.no_grad()
def test_weights_in_timms_names_as_training_takes_them(small, tmp_path):
    name, model, _ = small
    vit = create_model(
        "vit_base_patch16_clip_224", img_size=32, patch_size=8, embed_dim=64, depth=1, num_heads=2, num_classes=32
    )
    torch.nn.init.zeros_(vit.head.bias)
    state = {key: value for key, value in model.state_dict().items() if not key.startswith("visual.")}
    torch.save(state | {f"visual.trunk.{key}": value for key, value in vit.state_dict().items()}, tmp_path / "timm.pt")
    images, found = torch.randn(2, 3, 32, 32), load_model(name, f"{tmp_path}/timm.pt", quick_gelu=False)
    torch.testing.assert_close(found.images.encode_image(images, False), vit.eval()(images), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_pictures_have_the_size_of_a_tower_that_its_architecture_says_wrongly(tmp_path):
    """ViTamin-XL-384's architecture says 256 pixels, which timm's tower then refuses."""
    vision = {"timm_model_name": "vit_base_patch16_clip_224", "timm_model_pretrained": False, "image_size": 224}
    vision |= {"timm_pool": "token", "timm_proj": "linear"}
    config = {"embed_dim": 32, "vision_cfg": vision, "text_cfg": SMALL["text_cfg"], "custom_text": True}
    (tmp_path / "wrong-size.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "wrong-size.json")
    theirs = open_clip.create_model("wrong-size")
    torch.save(theirs.state_dict(), tmp_path / "wrong.pt")
    (tmp_path / "wrong-size.json").write_text(json.dumps({**config, "vision_cfg": {**vision, "image_size": 160}}))
    open_clip.add_model_config(tmp_path / "wrong-size.json")
    found = load_model("wrong-size", f"{tmp_path}/wrong.pt", False)
    assert found.image_size == 224


def test_weights_of_a_tag_have_the_activation_that_open_clip_builds():
    """roberta-ViT-B-32 has QuickGELU, which its tag does not record."""
    assert tag_quick_gelu("roberta-ViT-B-32", "laion2b_s12b_b32k")
    assert tag_quick_gelu("ViT-B-32", "openai") and not tag_quick_gelu("ViT-B-32", "laion2b_s34b_b79k")


def test_any_changed_weight_changes_the_digest():
    layer = torch.nn.Linear(3, 2)
    before = models.state_digest(layer, "a")
    assert before == models.state_digest(layer, "a") != models.state_digest(layer, "b")
    with torch.no_grad():
        layer.bias[1] += 1e-3
    assert models.state_digest(layer, "a") != before


@torch.no_grad()
def test_an_open_clip_model_gives_its_image_tower_to_reducers(small):
    name, _, weights = small
    loaded = load_model(name, weights, quick_gelu=False)
    images = torch.randn(2, 3, 32, 32)  # its normalisation is CLIP's
    reduced = ReducedTower(loaded.images.image_tower, {})
    torch.testing.assert_close(reduced.encode_image(images), loaded.images.encode_image(images), atol=1e-5, rtol=0)
