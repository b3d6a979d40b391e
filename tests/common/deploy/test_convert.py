"""`effclip convert`: from a run of `lightning fit` to a model directory, and back to open_clip."""

import errno
import json
from pathlib import Path
from types import SimpleNamespace

import open_clip
import pytest
import torch
from torch.nn import functional as F

from common import directory, run_record
from common.cli import main
from common.clip import CLIP
from common.data.embedded import module as embedded
from common.data.embedded.shapes import ATTRIBUTION, class_names
from common.data.embedded.twemoji import prompt
from common.deploy.convert import from_checkpoint
from common.deploy.model import load
from common.run_record import RunRecord
from common.zeroshot import embed_prompts
from tests.common.towers import NAMES, pictures, tiny_directory
from waveclip import WaveTower


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Checkpoints of a few steps of the embedded recipes on a miniature of their data: teacher, then WaveCLIP.

    WaveCLIP's teacher is deleted after its training.
    """
    folder = tmp_path_factory.mktemp("runs")
    sizes = {"train": (40, 10), "val": (14, 5), "test": (12, 6), "unseen": (6, 3), "retrieval": (9, 3)}
    small = ["-c", "common/smoke.yaml", "--trainer.max_steps", "2", "--trainer.val_check_interval", "2"]
    small += ["--data.batch_size", "4", "--data.num_workers", "0", "--trainer.accelerator", "cpu"]
    small += ["--trainer.precision", "32-true"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(embedded.SPLITS, 2, sizes)
        patch.setenv("EFFCLIP_RUNS", str(folder))
        assert main(["fit", "-c", "common/shapes_clip.yaml", *small]) == 0
        (teacher,) = folder.rglob("last.ckpt")
        module, _, _ = from_checkpoint(teacher)
        weights = folder / "teacher.safetensors"
        module.save(weights)
        wave = ["--model.weights", str(weights)]
        assert main(["fit", "-c", "waveclip/shapes.yaml", *small, *wave]) == 0
        (student,) = set(folder.rglob("last.ckpt")) - {teacher}
        weights.unlink()
    return teacher, student


def remembered(path):
    return torch.load(path, weights_only=True)


@torch.no_grad()
def test_a_run_becomes_a_directory_that_classifies(runs, tmp_path, capsys):
    _, student = runs
    assert main(["convert", str(student), str(tmp_path / "model")]) == 0
    listed = "README.md, model.json, model.safetensors, text.safetensors"
    assert listed in capsys.readouterr().out
    found = load(tmp_path / "model", device="cpu")
    assert found.model.type == "wave" and found.class_names == class_names("seen")
    state, images = remembered(student)["state_dict"], pictures(2, 48)
    wave = WaveTower.from_image_tower(CLIP.from_open_clip("common/shapes_clip.json").image_tower).eval()
    wave.load_state_dict({k.removeprefix("wave."): v for k, v in state.items() if k.startswith("wave.")})
    torch.testing.assert_close(found.model.images.encode_image(images), wave.encode_image(images))
    teacher = CLIP.from_open_clip("common/shapes_clip.json").eval()
    teacher.load_state_dict({k.removeprefix("teacher."): v for k, v in state.items() if k.startswith("teacher.")})
    expected = embed_prompts(teacher, [prompt(name) for name in found.class_names])
    torch.testing.assert_close(found.classes(found.class_names, found.templates), expected, atol=1e-5, rtol=0)


def test_the_card_is_written_from_the_run(runs, tmp_path):
    teacher, _ = runs
    assert main(["convert", str(teacher), str(tmp_path / "model")]) == 0
    card, run = (tmp_path / "model" / "README.md").read_text(), directory.read(tmp_path / "model").run
    metric = remembered(teacher)["callbacks"]["RunRecord"]["metrics"]["val_top1"]
    stated = run["conditions"]
    for said in (
        "| type | CLIP |",
        "CLIPPretraining (architecture common/shapes_clip.json",
        "common.data.embedded.EmbeddedDataModule",
        "'batch_size': 4",
        "| seed | 0 |",
        "| steps | 2 |",
        f"val_top1 {metric:.4f}",
        f"| revision at the start | {stated['revision']} (",
        "GMACs a picture, image tower, one path",
        "under the MIT licence",
        ATTRIBUTION,
        "effclip classify PICTURES --model model",
    ):
        assert said in card, said
    assert stated["scale"] == "embedded" and stated["date"] in card


@pytest.mark.parametrize(("own", "expected"), [(None, "a {}"), ("of a {}.", "of a {}.")])
def test_a_model_is_used_with_the_template_that_it_was_tuned_with(own, expected):
    record = RunRecord(SimpleNamespace(dump=lambda *_, **__: "model: {}"), None)
    data = SimpleNamespace(class_names=NAMES, templates=("a {}",))
    record.save_config(SimpleNamespace(datamodule=data), SimpleNamespace(template=own), "fit")
    assert record.record["templates"] == [expected]


def test_the_record_adds_up_the_hours_of_all_devices_over_resumed_runs(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(run_record, "time", SimpleNamespace(monotonic=lambda: clock.now))

    def begun(state=None):
        record = RunRecord(SimpleNamespace(dump=lambda *_, **__: "model: {}"), None)
        record.save_config(SimpleNamespace(datamodule=None), None, "fit")
        record.load_state_dict(state or {})
        record.on_train_start(SimpleNamespace(world_size=4), None)
        return record

    first = begun()
    clock.now += 1800
    saved = first.state_dict()
    assert saved["device_hours"] == pytest.approx(2)
    resumed = begun(saved)
    clock.now += 3600
    assert resumed.state_dict()["device_hours"] == pytest.approx(6)
    without = {name: value for name, value in saved.items() if name != "device_hours"}
    assert "device_hours" not in begun(without).state_dict()  # of an earlier version, which kept no time


def test_weights_of_this_suite_bring_their_card(tmp_path, capsys):
    clip = CLIP.tiny()
    WaveTower.from_image_tower(clip.image_tower).save(tmp_path / "wave.safetensors", clip.architecture)
    clip.save(tmp_path / "clip.safetensors")
    (tmp_path / "wave.md").write_text("# wave\n\nPictures by somebody, CC-BY.\n")
    (tmp_path / "names.txt").write_text("\n".join(NAMES))
    line = ["convert", str(tmp_path / "wave.safetensors"), str(tmp_path / "model")]
    others = ["--labels-file", str(tmp_path / "names.txt"), "--template", "the {}"]
    assert main([*line, "--text-model", str(tmp_path / "clip.safetensors"), *others]) == 0
    found = load(tmp_path / "model", device="cpu")
    assert (found.class_names, found.templates) == (NAMES, ("the {}",))
    card = (tmp_path / "model" / "README.md").read_text()
    assert "Pictures by somebody, CC-BY." in card and "by level" in card
    for wrong, message in (
        ([*line[:2], str(tmp_path / "x")], "has no text tower"),
        ([*line, "--text-model", str(tmp_path / "clip.safetensors")], "is there already; name a new folder"),
        (["convert", str(tmp_path / "wave.md"), "x"], "records no architecture"),
    ):
        assert main(wrong) == 1
        assert message in capsys.readouterr().err


class Payload:
    """Unpickling one of these would write a file."""

    def __reduce__(self):
        return (Path.touch, (Path("owned"),))


def test_nothing_of_a_checkpoint_is_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("evil.py").write_text("from pathlib import Path\nPath('owned').touch()\n")
    monkeypatch.syspath_prepend(tmp_path)
    whole = {"state_dict": {}, "global_step": 1}
    ours = {"_class_path": "evil.CLIPPretraining", "architecture": "common/shapes_clip.json"}
    cases = {
        "code": (whole | {"hyper_parameters": {"bad": Payload()}}, "could run code"),
        "class": (whole | {"hyper_parameters": {"_class_path": "evil.Training"}}, "of Training, which makes no model"),
        "nothing": ({"state_dict": {}}, "of no training that it names"),
        "list": ([1, 2], "of no training that it names"),
        "weights": (whole | {"hyper_parameters": ours}, "the checkpoint does not fit CLIPPretraining"),
    }
    for name, (content, message) in cases.items():
        torch.save(content, f"{name}.ckpt")
        assert main(["convert", f"{name}.ckpt", "model"]) == 1
        assert message in capsys.readouterr().err
    Path("cut.ckpt").write_bytes(Path("list.ckpt").read_bytes()[:100])
    assert main(["convert", "cut.ckpt", "model"]) == 1
    assert "is damaged, or no checkpoint" in capsys.readouterr().err
    assert not Path("owned").exists() and not Path("model").exists()


@torch.no_grad()
@pytest.mark.parametrize("quick_gelu", [False, True])
def test_a_plain_clip_goes_back_to_open_clip(tmp_path, quick_gelu, capsys):
    architecture = {
        "embed_dim": 32,
        "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2, "head_width": 32},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
        "quick_gelu": quick_gelu,
    }
    torch.manual_seed(0)
    clip = CLIP(architecture).eval()
    directory.write(tmp_path / "model", clip, None, run={"attribution": "Pictures of ours, CC-BY 4.0."})
    assert main(["export", str(tmp_path / "model"), "--format", "open-clip"]) == 0
    folder = tmp_path / "model" / "open-clip"
    assert f"open_clip.create_model('local-dir:{folder}')" in capsys.readouterr().out
    theirs = open_clip.create_model(f"local-dir:{folder}").eval()
    images, ids = pictures(3), open_clip.get_tokenizer("ViT-B-16")(["a cat", "two dogs in the rain"])
    torch.testing.assert_close(theirs.encode_image(images), clip.encode_image(images, False), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(theirs.encode_text(ids), clip.encode_text(ids, False), atol=1e-5, rtol=1e-5)
    assert theirs.logit_scale == clip.logit_scale
    assert (folder / "README.md").read_text().endswith("Pictures of ours, CC-BY 4.0.\n")  # as the directory's card
    assert (
        theirs.visual.preprocess_cfg["mean"]
        == json.loads((folder / "open_clip_config.json").read_text())["preprocess_cfg"]["mean"]
    )


@torch.no_grad()
def test_a_cut_vocabulary_goes_along_with_our_own_ids(tmp_path, capsys):
    folder = tiny_directory(tmp_path / "model", levels=0)
    assert main(["export", str(folder), "--format", "open-clip", "--out", str(tmp_path / "theirs")]) == 0
    assert "make text ids by common.tokenizer" in capsys.readouterr().out
    theirs = open_clip.create_model(f"local-dir:{tmp_path / 'theirs'}").eval()
    ours = CLIP.load(folder / "model.safetensors").eval()
    ids = ours.tokenizer(NAMES)
    found = F.normalize(theirs.encode_text(ids), dim=-1)
    torch.testing.assert_close(found, ours.encode_text(ids), atol=1e-5, rtol=0)
    wave = tiny_directory(tmp_path / "wave")
    assert main(["export", str(wave), "--format", "open-clip"]) == 1
    assert "is of type wave, for which open_clip has no image tower" in capsys.readouterr().err


def test_an_export_that_a_full_disk_stops_leaves_nothing(tmp_path, monkeypatch, capsys):
    folder = tiny_directory(tmp_path / "model", levels=0)

    def half(clip, target, credit):
        target.mkdir()
        (target / "open_clip_model.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device", str(target))

    monkeypatch.setattr(CLIP, "save_pretrained", half)
    assert main(["export", str(folder), "--format", "open-clip", "--out", str(tmp_path / "theirs")]) == 1
    assert "the disk is full; make room" in capsys.readouterr().err
    assert not (tmp_path / "theirs").exists()
