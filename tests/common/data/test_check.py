"""Whether a recipe's data is there: said by the constructor before anything else fails, and by data-check in detail."""

import io
import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from PIL import Image

from common.cli import main as lightning
from common.data import check, tar
from common.data.check import main
from common.data.embedded import module as embedded
from common.data.shards import ShardDataModule
from common.data.smoke import write_shards
from common.testing import TINY_CAPTIONS, tiny_architecture


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """A recipe over 3 shards of 4 pairs and 2 of 3, with manifests; gives its file and a way to change it."""
    monkeypatch.setenv("EFFCLIP_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("TINY_SHARDS", str(tmp_path))
    for split, (shards, samples) in {"train": (3, 4), "val": (2, 3)}.items():
        write_shards(tmp_path / split, shards, samples, manifest=True, txt=lambda n: TINY_CAPTIONS[n % 6].encode())
    init_args = {
        "architecture": tiny_architecture(tmp_path),
        "train_shards": "${TINY_SHARDS}/train/{000..002}.tar",
        "val_shards": "${TINY_SHARDS}/val/{000..001}.tar",
    }

    def write(**changes):
        file = tmp_path / "recipe.yaml"
        data = {"class_path": "common.data.shards.ShardDataModule", "init_args": {**init_args, **changes}}
        model = {"class_path": "common.pretraining.CLIPPretraining", "init_args": {"weights": "/no/such/weights"}}
        file.write_text(yaml.safe_dump({"model": model, "data": data, "trainer": {"accelerator": "gpu"}}))
        return str(file)

    return write


# --- the constructor ---


def test_missing_data_is_one_message_before_anything_else_fails(recipe, monkeypatch, capsys):
    file = recipe(variant="declip", train_num_samples=15388848, val_shards="${TINY_SHARDS}/val/{000..004}.tar")
    monkeypatch.delenv("TINY_SHARDS")
    assert lightning(["fit", "-c", file]) == 1
    said = capsys.readouterr().err
    assert "lightning: error: the data of this recipe (variant 'declip', 15,388,848 training samples)" in said
    assert "train_shards: '${TINY_SHARDS}/train/{000..002}.tar': set the environment variable TINY_SHARDS" in said
    assert "val_shards: " in said and "docs/data.md" in said and "weights" not in said
    monkeypatch.setenv("TINY_SHARDS", "/no/such/folder")
    assert lightning(["fit", "-c", file]) == 1
    assert "3 of 3 shards" in (said := capsys.readouterr().err) and "5 of 5 shards" in said


def test_the_number_of_samples_and_the_variant_are_compared_with_the_manifest(tmp_path, recipe):
    init_args = yaml.safe_load(Path(recipe()).read_text())["data"]["init_args"]
    assert ShardDataModule(**init_args, train_num_samples=12).train_num_samples == 12
    with pytest.raises(ValueError, match=r"expects 20 training samples, the shards hold 12; .*train_num_samples 12"):
        ShardDataModule(**init_args, train_num_samples=20)
    with pytest.raises(ValueError, match=r"variant 'declip', but the manifests say .*None"):
        ShardDataModule(**init_args, variant="declip")
    manifest = tmp_path / "train" / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "variant": "declip"}))
    ShardDataModule(**init_args, variant="declip")
    manifest.write_text("{}")
    with pytest.raises(ValueError, match="is not a manifest"):
        ShardDataModule(**init_args)
    manifest.unlink()
    with pytest.warns(UserWarning, match=r"that they are variant 'declip' .* is not verified"):
        ShardDataModule(**init_args, variant="declip", train_num_samples=20)


# --- data-check ---


def test_sound_data(tmp_path, recipe, capsys):
    assert main([recipe(), "--data.train_num_samples", "12"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"train: 3 shards, 12 samples\n.*noise, \d{4}-", said) and "val: 2 shards, 6 samples" in said
    assert "every byte read" in said and "all there" in said and "WRONG" not in said
    with Image.open(tmp_path / "runs" / "data-check" / "recipe" / "train.png") as sheet:
        colours = [sheet.getpixel((160 * place + 80, 80)) for place in range(6)]
    assert len(set(colours)) == 6 and (255, 255, 255) not in colours


def test_damage_is_found_and_named(tmp_path, recipe, capsys):
    def said(*arguments, code=1):
        assert main([recipe(), *arguments]) == code
        return "".join(capsys.readouterr())

    shard = tmp_path / "train" / "001.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:1000] + bytes([whole[1000] ^ 1]) + whole[1001:])
    assert f"WRONG: {shard}: its sha256 is not the manifest's" in said()
    assert "contents not read" in said("--no-verify", code=0)
    shard.write_bytes(whole[: len(whole) // 2])
    assert "001.tar has" in said("--no-verify")
    (tmp_path / "train" / "manifest.json").unlink()
    assert "WRONG: damaged: " in (text := said()) and "no manifest.json" in text
    shard.unlink()
    assert (text := said()).startswith("data-check: error: the data of this recipe") and "1 of 3 shards" in text


def test_remote_shards_are_read(tmp_path, recipe, capsys, monkeypatch):
    content = (tmp_path / "train" / "000.tar").read_bytes()
    served = {"http://host/0.tar": content, "http://host/1.tar": content[: len(content) // 2]}
    monkeypatch.setattr(tar, "_PAUSE", 0)
    monkeypatch.setattr(tar, "open_url", lambda url: io.BytesIO(served[url]))
    file = Path(recipe())
    text = yaml.safe_load(file.read_text())
    text["data"]["init_args"] |= {"train_shards": "http://host/0.tar", "train_num_samples": None, "val_shards": None}
    file.write_text(yaml.safe_dump(text))
    assert main([str(file)]) == 0 and "1 remote shards read to their end" in capsys.readouterr().out
    for url, message in (("http://host/1.tar", "truncated"), ("http://host/2.tar", "cannot be read")):
        assert main([str(file), f"--data.train_shards={url}"]) == 1
        assert f"WRONG: {url} cannot be read" in (printed := capsys.readouterr().out) and message in printed


def test_of_many_remote_shards_so_many_are_read_as_come_to_the_limit(tmp_path, recipe, capsys, monkeypatch):
    content = (tmp_path / "train" / "000.tar").read_bytes()
    monkeypatch.setattr(tar, "open_url", lambda url: io.BytesIO(content))
    monkeypatch.setattr(check, "SMALL", 1)
    file = Path(recipe())
    text = yaml.safe_load(file.read_text())
    shards = {"train_shards": "http://host/{0..7}.tar", "train_num_samples": None, "val_shards": None}
    text["data"]["init_args"] |= shards
    file.write_text(yaml.safe_dump(text))
    assert main([str(file)]) == 0 and "1 remote shards read to their end" in capsys.readouterr().out


def test_samples_that_cannot_be_decoded_are_found(tmp_path, recipe, capsys):
    write_shards(tmp_path / "train", 3, 4, manifest=True, txt=lambda n: b"words unknown to it")
    assert main([recipe()]) == 1
    assert "WRONG: sample s0-0: " in capsys.readouterr().out


def test_the_embedded_recipe_and_a_damaged_copy(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("EFFCLIP_RUNS", str(tmp_path / "runs"))
    monkeypatch.setitem(embedded.SPLITS, 1, {"train": (40, 10), "val": (14, 5), "retrieval": (4, 2)})
    assert main(["common/embedded_clip.yaml", f"--data.root={tmp_path / 'data'}"]) == 0
    assert "train: 4 shards, 40 samples" in capsys.readouterr().out
    shutil.copytree(tmp_path / "data", tmp_path / "copy")
    next((tmp_path / "copy").glob("*/val/001.tar")).unlink()
    shard = next((tmp_path / "copy").glob("*/train/002.tar"))
    shard.write_bytes(shard.read_bytes().replace(b"JFIF", b"JUNK", 1))
    assert main(["common/embedded_clip.yaml", f"--data.root={tmp_path / 'copy'}"]) == 1
    said = capsys.readouterr().out
    assert "train/002.tar: its sha256" in said and "val/001.tar is missing" in said and "all there" not in said


def test_what_is_no_recipe_of_shards(tmp_path, capsys):
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text("trainer: {max_steps: 4}")
    assert main([str(overlay)]) == 1 and "no data section" in capsys.readouterr().err
    overlay.write_text("words")
    assert main([str(overlay)]) == 1 and "is not a recipe" in capsys.readouterr().err
    overlay.write_text("data: {class_path: lightning.pytorch.demos.boring_classes.BoringDataModule}")
    assert main([str(overlay)]) == 1 and "does not read shards" in capsys.readouterr().err
    assert main([str(tmp_path / "none.yaml")]) == 1 and "no config file" in capsys.readouterr().err
