"""Weights in the layouts of other programs, against the programs themselves, and files that are refused."""

import io
import json
import shutil
import warnings
from pathlib import Path

import open_clip
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from timm import create_model
from torch import nn
from torch.nn import functional as F

from common import pretrained
from common.clip import CLIP
from common.models import load_model
from common.preprocess import Preprocess
from common.pretraining import CLIPPretraining
from common.weights import read_state_dict
from tests.common.towers import pictures
from waveclip import WaveCLIPDistillation

TEXT = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
PLAIN = {
    "embed_dim": 16,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2, "head_width": 16},
    "text_cfg": TEXT,
}


SAVED = Path(__file__).parent / "transformers_clip"
"""A CLIPModel of random weights that transformers 5.24 saved, and what it makes of some input (outputs.safetensors).

Its vocabulary has twelve ids, to keep the file small.
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """That folder with embeddings of zeros for the other ids of CLIP's vocabulary."""
    folder, name = tmp_path_factory.mktemp("hub") / "clip", "text_model.embeddings.token_embedding.weight"
    shutil.copytree(SAVED, folder)
    state, config = load_file(SAVED / "model.safetensors"), json.loads((SAVED / "config.json").read_text())
    state[name] = F.pad(state[name], (0, 0, 0, 49_408 - len(state[name])))
    save_file(state, folder / "model.safetensors")
    config["text_config"]["vocab_size"] = 49_408
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@torch.no_grad()
def equal_to_transformers(clip):
    outputs = load_file(SAVED / "outputs.safetensors")
    torch.testing.assert_close(clip.encode_image(outputs["images"]), outputs["image_embeds"], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(clip.encode_text(outputs["ids"]), outputs["text_embeds"], atol=1e-5, rtol=1e-4)


def test_a_folder_of_transformers(folder, tmp_path):
    expected = Preprocess(16, std=(0.5,) * 3, interpolation="bilinear", resize_mode="squash")
    for name in (str(folder), f"local-dir:{folder}"):
        model = load_model(name)
        assert (model.name, model.type, model.preprocess) == ("clip", "CLIP", expected)
        equal_to_transformers(model.images)
    (tmp_path / "plain.json").write_text(json.dumps(model.images.architecture))
    trained = CLIP.from_open_clip(f"{tmp_path}/plain.json", str(folder)).eval()
    equal_to_transformers(trained)
    assert trained.preprocess == expected


def described(folder, tmp_path, name, config):
    """That folder in another place, with another description of its pictures."""
    shutil.copytree(folder, tmp_path / "other")
    (tmp_path / "other" / "preprocessor_config.json").unlink()
    (tmp_path / "other" / name).write_text(config if isinstance(config, str) else json.dumps(config))
    return str(tmp_path / "other")


def test_pictures_are_prepared_as_the_file_of_a_whole_processor_says(folder, tmp_path):
    """As ``CLIPProcessor.save_pretrained`` of transformers 5 writes it."""
    pictures = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}, "resample": 2}
    other = described(
        folder, tmp_path, "processor_config.json", {"image_processor": pictures | {"do_normalize": False}}
    )
    assert load_model(other).preprocess == Preprocess(16, (0.0,) * 3, (1.0,) * 3, "bilinear")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"do_resize": False}, "do_resize is False"),
        ({"do_rescale": False}, "do_rescale is False"),
        ({"rescale_factor": 1.0}, "rescale_factor is 1.0"),
        ({"resample": 1}, r"resample 1 is neither 2 \(bilinear\) nor 3 \(bicubic\)"),
        ({"size": {"shortest_edge": 18}, "crop_size": 16}, "size {'shortest_edge': 18}, crop_size 16 and do_center_"),
        ({"size": {"shortest_edge": 16}, "crop_size": 14}, "crop_size 14 .* do not resize to the tower's 16 pixels"),
        ({"size": {"shortest_edge": 16}, "do_center_crop": False}, "do_center_crop False do not resize to"),
        ({"size": {"longest_edge": 16}, "crop_size": 16}, "size {'longest_edge': 16}"),
        ("no json", "preprocessor_config.json prepares pictures in a way that is not known here"),
        ("[]", "it is no JSON object; name the folder as the weights of an architecture and say --preprocess"),
        ({"size": [16, 16]}, r"size \[16, 16\] is neither a number nor"),
    ],
    ids=str,
)
def test_a_preparation_of_transformers_that_is_not_known_is_refused(folder, tmp_path, config, message):
    config = config if isinstance(config, str) else {"size": 16, "crop_size": 16} | config
    with pytest.raises(ValueError, match=message):
        load_model(described(folder, tmp_path, "preprocessor_config.json", config))


def test_who_says_how_pictures_are_prepared_needs_no_file_about_it(folder, tmp_path):
    other = described(folder, tmp_path, "preprocessor_config.json", {"do_resize": False})
    (tmp_path / "plain.json").write_text(json.dumps(load_model(str(folder)).images.architecture))
    clip = CLIP.from_open_clip(f"{tmp_path}/plain.json", other, preprocess="clip")
    assert clip.preprocess == Preprocess(16)


def test_null_in_a_preparation_of_transformers_is_the_default(folder, tmp_path):
    config = {"size": 16, "crop_size": 16, "do_resize": None, "rescale_factor": None, "resample": None}
    assert load_model(described(folder, tmp_path, "preprocessor_config.json", config)).preprocess == Preprocess(16)


def test_a_file_of_transformers(folder, tmp_path):
    (tmp_path / "plain.json").write_text(json.dumps(load_model(str(folder)).images.architecture))
    file = f"{folder}/model.safetensors"
    equal_to_transformers(CLIP.from_open_clip(f"{tmp_path}/plain.json", file, quick_gelu=True).eval())


def test_a_folder_of_open_clip(tmp_path):
    """Any of its architectures, here with a text tower kept apart."""
    model = open_clip.CustomTextCLIP(16, PLAIN["vision_cfg"], TEXT).eval()
    config = {"model_cfg": {**PLAIN, "quick_gelu": False, "custom_text": True}}
    config["preprocess_cfg"] = {"size": [32, 32], "resize_mode": "squash", "mean": [0.5] * 3}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    torch.save(model.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    loaded = load_model(f"local-dir:{tmp_path}")
    assert (loaded.type, loaded.name) == ("open_clip", tmp_path.name)
    assert loaded.preprocess == Preprocess(32, mean=(0.5,) * 3, resize_mode="squash")
    with torch.no_grad():
        torch.testing.assert_close(loaded.images.encode_image(pictures(2)), model.encode_image(pictures(2), True))
    torch.save({"visual.proj": torch.zeros(1)}, tmp_path / "open_clip_pytorch_model.bin")
    with pytest.raises(ValueError, match=r"open_clip_pytorch_model\.bin does not fit its open_clip_config\.json"):
        load_model(str(tmp_path))


def test_a_saved_clip_is_a_folder_of_open_clip(tmp_path):
    """With open_clip's own transform; here the file brings the cut vocabulary back, which open_clip ignores."""
    squash = Preprocess(32, resize_mode="squash", interpolation="bilinear", mean=(0.1, 0.2, 0.3))
    clip = CLIP(squash.recorded_in(CLIP.tiny().architecture)).eval()
    clip.save_pretrained(tmp_path / "saved")
    theirs, transform = open_clip.create_model_from_pretrained(f"local-dir:{tmp_path}/saved")
    with torch.no_grad():
        torch.testing.assert_close(theirs.encode_image(pictures(2), True), clip.encode_image(pictures(2)))
        ids = clip.tokenizer(["a red cat"], longest=False)
        torch.testing.assert_close(theirs.encode_text(ids, True), clip.encode_text(ids))
    assert "bilinear" in str(transform.transforms[0]) and transform.transforms[-1].mean == [0.1, 0.2, 0.3]
    again = load_model(str(tmp_path / "saved"))
    assert (again.type, again.name, again.preprocess) == ("CLIP", "saved", squash)
    assert again.images.architecture == {**clip.architecture, "quick_gelu": False}
    assert torch.equal(again.images.encode_image(pictures(2)), clip.encode_image(pictures(2)))


def test_a_saved_clip_has_a_card_that_a_writer_may_change(tmp_path):
    clip = CLIP.tiny()
    clip.save_pretrained(tmp_path / "saved", "Trained on pictures of ours, CC-BY 4.0.")
    card = (tmp_path / "saved" / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["library_name"] == "open_clip"
    assert "| preprocessing | bicubic, shortest; mean (0.48145466," in card and "| activation | GELU |" in card
    assert "local-dir:FOLDER" in card and card.endswith("\n\nTrained on pictures of ours, CC-BY 4.0.\n")
    (tmp_path / "saved" / "README.md").write_text("my own words")
    clip.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "README.md").read_text() == "my own words"


def test_a_model_of_the_hub_is_fetched_as_a_folder(folder, monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    asked = []

    def download(repository, name):
        asked.append((repository, name))
        if not (folder / name).is_file():
            raise EntryNotFoundError(name)
        return str(folder / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr("common.network.reachable", lambda: True)
    model = load_model("hf-hub:someone/clip")
    equal_to_transformers(model.images)
    assert model.name == "clip"
    assert {repository for repository, _ in asked} == {"someone/clip"}
    with pytest.raises(ValueError, match="hf-hub:someone/clip records its architecture; --weights"):
        load_model("hf-hub:someone/clip", "openai")


@pytest.mark.parametrize("door", [CLIP.from_open_clip, CLIPPretraining, WaveCLIPDistillation])
def test_a_folder_with_weights_is_no_architecture_whose_weights_are_random(folder, door):
    with pytest.raises(ValueError, match=r"local-dir:.* is a model with weights, .*; name it as the weights, and"):
        door(f"local-dir:{folder}")


def test_without_a_network_a_model_of_the_hub_is_refused(monkeypatch):
    monkeypatch.setattr("common.network.reachable", lambda: False)
    monkeypatch.setattr(pretrained, "_fetched", lambda *_, **__: {})
    with pytest.raises(ValueError, match=r"the model no/such cannot be downloaded.*give a folder"):
        load_model("hf-hub:no/such")


def test_offline_a_model_that_is_not_cached_is_not_said_to_be_of_another_layout(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match="hf-hub:no/such is not whole in the cache, and HF_HUB_OFFLINE keeps from"):
        load_model("hf-hub:no/such")


@torch.no_grad()
def test_an_image_tower_in_timms_names():
    """Below visual.trunk., as open_clip keeps it."""
    vit = create_model(
        "vit_base_patch16_clip_224", img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=4, num_classes=16
    ).eval()
    clip = CLIP({**PLAIN, "quick_gelu": False}).eval()
    texts = {key: value for key, value in clip.open_clip_state_dict().items() if not key.startswith("visual.")}
    nn.init.zeros_(vit.head.bias)
    clip.load_weights(texts | {f"visual.trunk.{key}": value for key, value in vit.state_dict().items()})
    torch.testing.assert_close(clip.encode_image(pictures(2), False), vit(pictures(2)), atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match=r"vit\.pt holds an image tower without a text tower"):
        clip.load_weights(vit.state_dict(), "vit.pt")


@pytest.mark.parametrize("wrap", ["_orig_mod.{}", "module._orig_mod.{}", "_orig_mod.module.model.{}"])
def test_names_of_wrapped_models(wrap, tmp_path):
    clip = CLIP.tiny()
    torch.save({wrap.format(key): value for key, value in clip.state_dict().items()}, tmp_path / "a.pt")
    assert read_state_dict(tmp_path / "a.pt").keys() == clip.state_dict().keys()


def test_a_compiled_part_keeps_its_names(tmp_path):
    clip = CLIP.tiny()
    names = clip.state_dict().keys()
    clip.image_tower = torch.compile(clip.image_tower, backend="eager")
    torch.save(clip.state_dict(), tmp_path / "a.pt")
    assert read_state_dict(tmp_path / "a.pt").keys() == names


def archive():
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), file)
    return file.getvalue()


def saved(value):
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.pt", b"", "it is empty; copy or download it again"),
        ("a.pt", b"<html>Not found</html>", "begins with b'<html>Not found<'; copy or download it again"),
        ("a.pt", b"version https://git-lfs.github.com/spec/v1\n", "fetch that by `git lfs pull`"),
        ("a.pt", saved({"a": torch.zeros(1000)})[:2000], "is damaged, or no checkpoint .*copy or download it again"),
        ("a.pt", saved(nn.Linear(2, 2)), r"could run code .*save its state dict alone"),
        ("a.pt", saved([torch.zeros(1)]), "holds no state dict"),
        ("a.pt", saved({"state_dict": {}}), "holds no state dict"),
        ("a.pt", archive(), "TorchScript archive.*give --weights openai"),
        ("a.safetensors", b"", "is no whole safetensors file"),
        ("a.safetensors", b"<html>Not found</html>", "is no whole safetensors file"),
        ("a.safetensors", saved({"a": torch.zeros(1000)}), "is no whole safetensors file.*name it .pt if torch.save"),
    ],
)
def test_a_file_that_holds_no_weights_says_what_to_do(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        CLIP.from_open_clip("ViT-B-32", f"{tmp_path}/{name}", quick_gelu=False)
    assert str(tmp_path / name) in str(error.value) and "weights_only" not in str(error.value)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"config.json": "{}"}, r"config.json describes no CLIP: its model_type is None"),
        (
            {"config.json": '{"model_type": "siglip"}'},
            "its model_type is 'siglip', not 'clip' .*ViT-B-16-SigLIP.*`adapt",
        ),
        ({"config.json": "no json"}, "config.json describes no CLIP"),
        ({"open_clip_config.json": "{}"}, "'model_cfg' is missing"),
        ({"config.json": '{"model_type": "clip"}'}, "has no weights, model.safetensors or pytorch_model.bin; several"),
        ({"open_clip_config.json": json.dumps({"model_cfg": PLAIN})}, "has no weights, open_clip_model.safetensors or"),
    ],
)
def test_a_folder_that_describes_no_clip_is_refused(files, message, tmp_path):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        load_model(str(tmp_path))


def test_another_vocabulary_is_refused():
    with pytest.raises(ValueError, match="its vocabulary has 12 ids, CLIP's tokenizer has 49,408"):
        load_model(str(SAVED))


def test_architectures_that_no_tower_of_this_suite_has():
    with pytest.raises(ValueError, match=r"RN50: vision_cfg.layers = \[3, 4, 6, 3\] is not part of"):
        CLIP.from_open_clip("RN50", "openai")
    with pytest.raises(ValueError, match="no folder at /no/where; local-dir: is followed by one"):
        load_model("local-dir:/no/where")


def test_a_text_tower_of_transformers_without_a_network(tmp_path, monkeypatch):
    torch.save({"visual.proj": torch.zeros(1)}, tmp_path / "a.pt")
    monkeypatch.setattr("common.network.reachable", lambda: False)
    refused = r"the text side of roberta-ViT-B-32, transformers' roberta-base, cannot be downloaded.*HF_HOME"
    with pytest.raises(ValueError, match=refused):
        load_model("roberta-ViT-B-32", f"{tmp_path}/a.pt", quick_gelu=True)
