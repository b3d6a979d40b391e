"""Model directories: what was written comes back, and nothing that does not belong together is loaded."""

import json

import pytest
import torch

from common import directory
from common.clip import CLIP
from common.models import load_model
from common.text_model import TextModel
from tests.common.towers import NAMES, pictures, tiny_directory
from waveclip import WaveTower


@torch.no_grad()
def test_a_tower_with_its_text_side(tmp_path):
    folder, images = tiny_directory(tmp_path / "model"), pictures(2)
    assert sorted(path.name for path in folder.iterdir()) == ["model.json", "model.safetensors", "text.safetensors"]
    described = directory.read(folder)
    assert (described.type, described.class_names, described.templates) == ("wave", NAMES, ["{a} {}"])
    assert described.architecture["text_cfg"]["vocabulary"] == CLIP.tiny().architecture["text_cfg"]["vocabulary"]
    found = load_model(str(folder))
    assert (found.type, found.image_size, found.name, found.folder) == ("wave", 32, "model", folder)
    torch.manual_seed(0)
    clip = CLIP.tiny().eval()
    wave = WaveTower.from_image_tower(clip.image_tower).eval()
    torch.testing.assert_close(found.images.encode_image(images), wave.encode_image(images))
    ids = clip.tokenizer(NAMES)
    assert torch.equal(found.texts.tokenizer(NAMES), ids)
    torch.testing.assert_close(found.texts.encode_text(ids), clip.encode_text(ids))
    assert found.texts.logit_scale == clip.logit_scale and found.weights["image"] != found.weights["text"]


@torch.no_grad()
def test_a_whole_clip_is_one_file(tmp_path):
    folder = tiny_directory(tmp_path / "clip", levels=0)
    assert sorted(path.name for path in folder.iterdir()) == ["model.json", "model.safetensors"]
    found = load_model(str(folder))
    assert found.type == "CLIP" and found.texts is found.images
    assert load_model(str(tmp_path / "clip" / "model.safetensors")).weights == found.weights


def test_it_lends_its_text_side(tmp_path):
    folder, wave = tiny_directory(tmp_path / "a"), tmp_path / "wave.safetensors"
    clip = CLIP.tiny()
    WaveTower.from_image_tower(clip.image_tower).save(wave, clip.architecture)
    both = load_model(str(wave), text_model=str(folder))
    assert isinstance(both.texts, TextModel) and both.folder is None
    assert both.weights["text"] == directory.read(folder).files["text.safetensors"]


def test_a_folder_in_use_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(ValueError, match="is there already; name a new folder"):
        tiny_directory(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def changed(folder, change):
    """model.json with some fields changed."""
    fields = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps(change(fields)))


def test_what_does_not_belong_together_is_refused(tmp_path):
    folder, other = tiny_directory(tmp_path / "a"), tiny_directory(tmp_path / "b", levels=0)
    whole = (folder / "model.json").read_text()

    def refused(message):
        with pytest.raises(ValueError, match=message):
            load_model(str(folder))
        (folder / "model.json").write_text(whole)

    changed(folder, lambda fields: fields | {"format": 2})
    refused("has format 2, this version reads 1")
    changed(folder, lambda fields: fields | {"architecture": fields["architecture"] | {"embed_dim": 7}})
    refused(r"states another architecture than model\.safetensors")
    changed(folder, lambda fields: fields | {"files": {}})
    refused("states another architecture")
    changed(folder, lambda fields: fields | {"class_path": "os.system"})
    refused("does not describe a model")
    (folder / "model.json").write_text("[]")
    refused("does not describe a model")
    text = (folder / "text.safetensors").read_bytes()
    (folder / "text.safetensors").unlink()
    refused(r"text\.safetensors is missing")
    (folder / "text.safetensors").write_bytes((other / "model.safetensors").read_bytes())
    refused(r"text\.safetensors is not the file that model\.json describes")
    (folder / "text.safetensors").write_bytes(text)
    assert load_model(str(folder)).type == "wave"
    with pytest.raises(ValueError, match="holds no text tower alone"):
        TextModel.load(other / "model.safetensors")


def test_files_have_the_rights_that_the_umask_gives(tmp_path):
    folder = tiny_directory(tmp_path / "model")
    (tmp_path / "plain").touch()
    assert {path.stat().st_mode for path in [*folder.iterdir(), tmp_path / "plain"]} == {
        (tmp_path / "plain").stat().st_mode
    }
